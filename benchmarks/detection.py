"""Detectors against torchvision's own: ours over the CSP networks, and the batched form of each family.

    python -m benchmarks.detection [--size 512] [--batch-size 2] [--rounds 5] [--device cuda] [--json FILE]

Side by side in one run: in every round each contestant has its turn on the same images in memory, and the ratios are
medians over the rounds. The first part sets the ratio of time beside that of multiply-adds, each against
`fasterrcnn_resnet50_fpn` as torchvision builds it: time over arithmetic above 1 is what ours loses by its construction.
Random networks propose different numbers of regions: multiply-adds are of those that were counted, and the same scores
for all give NMS as much to do a region on either side. The second compares `detection.batched` with torchvision's
list-based forward on the same weights: the same detections, and no slower.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models import detection as tv

from backbones.checkpoint import device_name, pick_device
from backbones.cli import at_least
from backbones.errors import InputError, exit_on_input_error
from backbones.files import versions, write_json
from backbones.preprocess import DetectorPreprocess
from benchmarks.contest import excite, table, take_turns
from detection.batched import BatchedDetector
from detection.models import create_detector, thresholds
from detection.profile import PUBLISHED_MODELS, profile

PEER = "fasterrcnn_resnet50_fpn"
FAMILIES = ("fasterrcnn", "retinanet", "fcos")
DIVISOR = 128
BATCH = 8  # of the comparison of forms
NEAR, NEAR_SCORE = 1e-3, 1e-4  # pixels, probability
MOST = 1.05  # of time over multiply-adds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=PUBLISHED_MODELS, help="backbones")
    parser.add_argument("--size", type=at_least(128), default=512, help=f"pixels of a side, a multiple of {DIVISOR}")
    parser.add_argument("--batch-size", type=at_least(1), default=2, help="images of the first part's batches")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.size % DIVISOR:
        raise InputError(f"--size {args.size} is no multiple of {DIVISOR}: both sides would not see the same canvas")
    device = pick_device(args.device)
    result: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "settings": vars(args) | {"json": None}, "versions": versions("torch", "torchvision"), "peer": {}, "forms": {},
    }  # fmt: skip
    for name in args.models:
        result["peer"][name] = against_peer(f"fasterrcnn_{name}_fpn", args, device)
        print(json.dumps({name: result["peer"][name]}, indent=1), flush=True)
    for family in FAMILIES:
        result["forms"][family] = against_list(f"{family}_{args.models[0]}_fpn", args, device)
        print(json.dumps({family: result["forms"][family]}, indent=1), flush=True)
    print(markdown(result))
    if args.json:
        write_json(args.json, result)


def against_peer(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time and multiply-adds of ours over the peer's, in training and in inference, from random weights."""
    torch.manual_seed(0)
    size = args.size
    preprocess = DetectorPreprocess(min_size=size, max_size=size, divisor=DIVISOR)
    models = {
        "ours": create_detector(name, preprocess=preprocess).to(device),
        "torchvision": tv.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=size, max_size=size, size_divisible=DIVISOR
        ).to(device),
    }  # fmt: skip
    images = [torch.rand(3, size, size, device=device) for _ in range(args.batch_size)]
    found: dict[str, Any] = {}
    for task, work in (("training", training_step), ("inference", inference)):
        contestants = {key: work(model, images, device) for key, model in models.items()}
        for model in models.values():
            level_scores(model)
        regions = [count_regions(models[key], contestants[key]) for key in models]
        turns = take_turns(contestants, args.rounds)
        costs = [
            profile(each, [(size, size)], proposals=count).gmacs[0]
            for each, count in zip((name, PEER), regions, strict=True)
        ]
        time, arithmetic = 1 / turns["ours_over"]["torchvision"], costs[0] / costs[1]
        ratios = {"time": time, "gmacs": arithmetic, "time_over_gmacs": time / arithmetic}
        met = ratios["time_over_gmacs"] <= MOST
        found[task] = turns | {"regions": regions, "gmacs": costs, "ratios": ratios, "met": met}
    return found


def level_scores(model: nn.Module) -> None:
    """Give all regions the same scores, with one class above the threshold."""
    scores = model.get_submodule("roi_heads.box_predictor.cls_score")
    with torch.no_grad():
        for parameter in scores.parameters():
            parameter.zero_()
        scores.get_parameter("bias")[1] = 5.0


def count_regions(model: nn.Module, work: Callable[[], int]) -> int:
    """Regions of an image that the box head sees."""
    rows: list[int] = []
    head = model.get_submodule("roi_heads.box_head")
    hook = head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    images = work()
    hook.remove()
    return round(sum(rows) / images)


def training_step(model: nn.Module, images: list[Tensor], device: torch.device) -> Callable[[], int]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    side = images[0].shape[-1]
    corners = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.5, 0.9, 0.8], [0.6, 0.2, 0.7, 0.3]], device=device)
    target = {"boxes": corners * side, "labels": torch.tensor([1, 17, 62], device=device)}

    def work() -> int:
        loss = sum(model.train()(images, [target] * len(images)).values(), torch.zeros((), device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        finish(device)
        return len(images)

    return work


def inference(model: nn.Module, images: list[Tensor], device: torch.device) -> Callable[[], int]:
    @torch.inference_mode()
    def work() -> int:
        model.eval()(images)
        finish(device)
        return len(images)

    return work


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def against_list(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Speed of the batched form over the list-based one, both from the same uint8 pixels, and how far boxes are."""
    torch.manual_seed(0)
    preprocess = DetectorPreprocess(min_size=args.size, max_size=args.size, divisor=DIVISOR)
    model = create_detector(name, preprocess=preprocess).to(device).eval()
    blots = torch.rand(BATCH, 3, 24, 24, device=device)
    pixels = nn.functional.interpolate(blots, (args.size, args.size), mode="bilinear").mul(255).byte()
    images = pixels.permute(0, 2, 3, 1).contiguous()  # [N, H, W, 3]
    sizes = torch.tensor([[args.size, args.size]] * BATCH, device=device)
    excite(model, [image.permute(2, 0, 1).float() / 255 for image in images[:1]])
    batched = BatchedDetector(model)

    @torch.inference_mode()
    def as_batch() -> int:
        batched(images, sizes)
        finish(device)
        return BATCH

    def listed() -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = model([image.permute(2, 0, 1).float() / 255 for image in images])
        return found

    @torch.inference_mode()
    def as_list() -> int:
        listed()
        finish(device)
        return BATCH

    with torch.inference_mode():
        boxes, scores, labels, counts = batched(images, sizes)
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        rows = [{key: value[i, :n] for key, value in found.items()} for i, n in enumerate(counts.tolist())]
        same = agreement(rows, listed())
    turns = take_turns({"batched": as_batch, "list": as_list}, args.rounds)
    met = turns["ours_over"]["list"] >= 1 and same["shared"] == same["detections"] > 0
    return turns | same | {"batch": BATCH, "thresholds": thresholds(model), "met": met}


def agreement(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> dict[str, Any]:
    """How many detections both have, one to one, of how many: a box within NEAR, a score within NEAR_SCORE and the same
    class.
    """
    shared = total = 0
    for ours, theirs in zip(found, expected, strict=True):
        total += max(len(ours["labels"]), len(theirs["labels"]))
        near = ((ours["boxes"][:, None] - theirs["boxes"]).abs() < NEAR).all(-1)  # [K, L]
        near &= (ours["scores"][:, None] - theirs["scores"]).abs() < NEAR_SCORE
        near &= ours["labels"][:, None] == theirs["labels"]
        pairs = near.cpu().numpy()
        shared += int(pairs[linear_sum_assignment(pairs, maximize=True)].sum())
    return {"detections": total, "shared": shared}


def markdown(result: dict[str, Any]) -> str:
    """The ratios as tables."""
    head = (
        "backbone, Faster R-CNN", "task", "ours, images/s", "time / torchvision's", "GMACs / torchvision's",
        "time / GMACs", f"at most {MOST}",
    )  # fmt: skip
    rows = []
    for name, tasks in result["peer"].items():
        for task, r in tasks.items():
            ratios = [f"{value:.3f}" for value in r["ratios"].values()]
            rows.append((name, task, f"{r['images_per_s']['ours']:.2f}", *ratios, verdict(r)))
    lines = [*table(head, rows), ""]
    forms = []
    for family, r in result["forms"].items():
        low, high = r["spread"]["list"]
        ratio = f"{r['ours_over']['list']:.3f} ({low:.2f}…{high:.2f})"
        counts = str(r["detections"]), str(r["shared"])
        forms.append((family, f"{r['images_per_s']['batched']:.2f}", ratio, *counts, verdict(r)))
    columns = (
        "family", "batched, images/s", "batched / list (spread)", "detections", "shared", "at least 1, all shared",
    )  # fmt: skip
    return "\n".join(lines + table(columns, forms))


def verdict(result: dict[str, Any]) -> str:
    return "met" if result["met"] else "not met"


if __name__ == "__main__":
    with exit_on_input_error():
        main()
