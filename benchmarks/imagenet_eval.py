"""Images a second of the ImageNet evaluation against timm's own, and a training step against timm's.

    python -m benchmarks.imagenet_eval [--root /data/imagenette] [--models …] [--images 96] [--rounds 5] [--json FILE]

Side by side in one run: in every round each contestant has its turn over the same images, and the ratios are medians
over the rounds. The limit of an evaluation is the model alone on batches that lie in memory already: what a loader
adds to that is decoding, which costs milliseconds of one core an image, and copying one uint8 pixel once. Without
`--root` the images are drawn, with about as many bytes as photographs of ImageNet's mean size.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torch.nn.functional as F

from backbones.checkpoint import device_name, pick_device
from backbones.cli import at_least
from backbones.config import ImageData
from backbones.cspnet import create_model
from backbones.engine import normalize, predict, train_one_epoch
from backbones.errors import exit_on_input_error
from backbones.files import versions, write_json
from backbones.imagenet import ImageNet, create_loader
from backbones.published import ALIASES, protocol
from backbones.samples import list_samples
from benchmarks.batch import draw
from benchmarks.contest import take_turns

MODELS = ("cspresnet50", "cspresnext50", "cspdarknet50")
TRAIN_SIZE, TRAIN_BATCH, TRAIN_STEPS = 128, 8, 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="an image folder: <root>/val/<class>/*.JPEG")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--images", type=at_least(1), default=96)
    parser.add_argument("--batch-size", type=at_least(1), default=16)
    parser.add_argument("--workers", type=at_least(0), default=1)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    result: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "settings": vars(args) | {"json": None, "root": args.root and args.root.name},
        "versions": versions("torch", "torchvision", "timm", "pillow"), "models": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = args.root or draw_split(Path(folder), args.images)
        for name in args.models:
            evaluation = take_turns(evaluations(name, root, args, device), args.rounds)
            training = take_turns(training_steps(name, device), args.rounds)
            result["models"][name] = {"evaluation": evaluation, "training": training}
            print(json.dumps({name: result["models"][name]}, indent=1), flush=True)
    print(markdown(result))
    if args.json:
        write_json(args.json, result)


def draw_split(root: Path, count: int) -> Path:
    """A data set whose split `val` has so many images, all of class 0."""
    (root / "val").mkdir()
    draw(root / "val" / "0", count)
    return root


def evaluations(name: str, root: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], int]]:
    """Ours, timm's, and our model alone, over the same `args.images` files."""
    preprocess = protocol(name)
    samples, _ = list_samples(ImageData(root=str(root)), "val", 1000)
    samples = samples[:: max(1, len(samples) // args.images)][: args.images]
    dataset = ImageNet(samples, preprocess)
    model = create_model(name).to(device).eval()
    peer = timm.create_model(timm_name(name)).to(device).eval()
    peer.load_state_dict(model.state_dict())
    loader = create_loader(dataset, args.batch_size, 0)
    batches = [normalize(pixels.to(device), preprocess).contiguous() for pixels, _ in loader]
    with torch.inference_mode():  # the race is about the same work
        torch.testing.assert_close(model(batches[0]), peer(batches[0]), rtol=1e-3, atol=1e-4)

    def ours() -> int:
        return len(predict(model, dataset, batch_size=args.batch_size, workers=args.workers).indices)

    def theirs() -> int:
        files = timm.data.ImageDataset("", reader=TimmReader([str(sample.source) for sample in samples]))
        loader = timm.data.create_loader(
            files, (3, preprocess.crop, preprocess.crop), args.batch_size, use_prefetcher=device.type == "cuda",
            interpolation=preprocess.interpolation, crop_pct=peer.default_cfg["crop_pct"], num_workers=args.workers,
            device=device, persistent_workers=False,
        )  # fmt: skip
        with torch.inference_mode():
            return sum(len(peer(images.to(device)).cpu()) for images, _ in loader)

    @torch.inference_mode()
    def alone() -> int:
        return sum(len(model(batch).cpu()) for batch in batches)

    return {"ours": ours, "timm": theirs, "model alone": alone}


class TimmReader:
    """timm asks a reader for the open file and the class."""

    def __init__(self, files: list[str]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open(self.files[index], "rb"), 0


def training_steps(name: str, device: torch.device) -> dict[str, Callable[[], int]]:
    """The same SGD steps on the same images in memory: our loop and model, our loop and timm's model, a bare loop and
    timm's model.
    """
    preprocess = protocol(name)
    pixels = torch.randint(0, 256, (TRAIN_BATCH, TRAIN_SIZE, TRAIN_SIZE, 3), dtype=torch.uint8)
    targets = torch.arange(TRAIN_BATCH)

    def of(model: torch.nn.Module) -> Callable[[], int]:
        model = model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, enabled=False)

        def work() -> int:
            loader = [(pixels, targets)] * TRAIN_STEPS
            train_one_epoch(model, loader, targets, optimizer, scaler, preprocess, [1e-3] * TRAIN_STEPS)
            return TRAIN_BATCH * TRAIN_STEPS

        return work

    def bare() -> Callable[[], int]:
        model = timm.create_model(timm_name(name)).to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        images, classes = normalize(pixels.to(device), preprocess).contiguous(), targets.to(device)

        def work() -> int:
            for _ in range(TRAIN_STEPS):
                loss = F.cross_entropy(model(images), classes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item()
            return TRAIN_BATCH * TRAIN_STEPS

        return work

    return {"ours": of(create_model(name)), "timm's model": of(timm.create_model(timm_name(name))), "bare timm": bare()}


def timm_name(name: str) -> str:
    return {ours: theirs for theirs, ours in ALIASES.items()}.get(name, name)


def markdown(result: dict[str, Any]) -> str:
    """The ratios as tables."""
    lines: list[str] = []
    for task in ("evaluation", "training"):
        first = next(iter(result["models"].values()))[task]
        peers = list(first["ours_over"])
        lines += ["", f"| {task} | ours, images/s | " + " | ".join(f"ours / {peer}" for peer in peers) + " |"]
        lines.append("|---|---|" + "---|" * len(peers))
        lines += list(rows(result, task))
    return "\n".join(lines)


def rows(result: dict[str, Any], task: str) -> Iterator[str]:
    for name, figures in result["models"].items():
        got = figures[task]
        cells = [f"{got['ours_over'][peer]:.3f} ({low:.2f}…{high:.2f})" for peer, (low, high) in got["spread"].items()]
        yield f"| {name} | {got['images_per_s']['ours']:.2f} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    with exit_on_input_error():
        main()
