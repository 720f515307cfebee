"""CSP networks beside timm's of the same name and torchvision's: what they cost, and their speed on this machine's CPU.

    python -m benchmarks.backbones [--models cspresnet50 …] [--size 224] [--rounds 5] [--json FILE]

Side by side in one run: a network, timm's and torchvision's ResNet-50 take turns on each runtime, at batch 1 and 8, all
at the same resolution, and the ratios are medians over the rounds. Weights are random; timm's network has ours, and
must give the same logits. PyTorch runs channels_last, and all runtimes have as many threads. Ours is its artefact,
which takes uint8 pixels and normalises them; the others' are torch.onnx.export's graphs of the networks as they are,
whose floats lie ready: what ours does more is part of its time.

Multiply-adds are counted as `backbones.profile` does for all. Accuracies are those that others published, under the
protocols and at the sizes beside them; none was measured here.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from backbones.cli import at_least
from backbones.cspnet import get_variant
from backbones.errors import exit_on_input_error
from backbones.files import versions, write_json
from backbones.profile import count
from backbones.published import PAPER, RELEASES
from benchmarks.contest import ratio, table, take_turns
from benchmarks.export import compiled, in_session, in_torch, random_classifier
from benchmarks.imagenet_eval import timm_name
from benchmarks.plain import in_onnxruntime, in_openvino, quietly
from serving.export import run_export
from serving.runtime import OnnxModel, Provider, usable_cores

PEER = "resnet50"  # torchvision's
TORCHVISION = (PEER, "resnext50_32x4d", "densenet121")
MODELS = ("cspresnet50", "cspresnext50", "cspdarknet50", "cspdensenet201_elastic", "csppeleenet", *TORCHVISION)
BATCHES = (1, 8)
PROVIDERS: dict[str, Provider] = {"onnxruntime": "cpu", "OpenVINO": "openvino"}
Turns = dict[tuple[str, int], Callable[[], int]]  # by runtime and batch


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"ours, and {', '.join(TORCHVISION)}")
    parser.add_argument("--size", type=at_least(64), default=224, help="pixels of a side")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(usable_cores())
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "threads": usable_cores(), "settings": vars(args) | {"json": None},
        "versions": versions("torch", "torchvision", "timm", "onnxruntime-gpu", "openvino"), "models": {},
    }  # fmt: skip
    pixels = torch.randint(0, 256, (max(BATCHES), args.size, args.size, 3), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        peer = theirs(torchvision.models.get_model(PEER), pixels, Path(folder), args)
        for name in args.models:
            result["models"][name] = race(name, peer, pixels, Path(folder), args)
            print(json.dumps({name: result["models"][name]}, indent=1), flush=True)
    print(markdown(result))
    if args.json:
        write_json(args.json, result)


def race(name: str, peer: Turns, pixels: Tensor, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a network costs, what was published of it, and its turns against timm's and ResNet-50 on every runtime.

    Raises:
        InputError: no such network.
    """
    rivals: dict[str, Turns] = {PEER: peer}
    if name == PEER:
        model: nn.Module = torchvision.models.get_model(PEER)
        figures = of_torchvision(name)
    elif name in TORCHVISION:
        model, figures = torchvision.models.get_model(name), of_torchvision(name)
        rivals = {name: theirs(model, pixels, folder, args)} | rivals
    else:
        exported, _ = random_classifier(name, folder / "w.safetensors")
        model, figures = exported.get_submodule("model"), of_ours(name)
        rivals = {name: ours(model, pixels, folder, args)} | rivals
        if timm.is_model(timm_name(name)):
            rivals["timm"] = theirs(twin(name, model), pixels, folder, args)
    for figure in figures:
        figure["gmacs"] = gmacs(model, figure["size"])
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "gmacs": gmacs(model, args.size),
        "published": figures,
        "speeds": [
            {"runtime": key[0], "batch": key[1]}
            | take_turns({rival: turns[key] for rival, turns in rivals.items() if key in turns}, args.rounds)
            for key in next(iter(rivals.values()))
        ],
    }


def twin(name: str, model: nn.Module) -> nn.Module:
    """timm's network of that name with our weights: the race is about the same work."""
    other: nn.Module = timm.create_model(timm_name(name)).eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), other(images), rtol=1e-3, atol=1e-4)
    return other


def gmacs(model: nn.Module, size: int) -> float:
    """Billions of multiply-adds of an image of `size` x `size` pixels."""
    return count(copy.deepcopy(model).to("meta"), size).gmacs


def ours(model: nn.Module, pixels: Tensor, folder: Path, args: argparse.Namespace) -> Turns:
    """A network of this project, whose weights are in the folder."""
    turns = in_pytorch(model, pixels, args)
    run_export(str(folder / "w.safetensors"), folder / "ours.onnx")
    for runtime, provider in PROVIDERS.items():
        session = OnnxModel(folder / "ours.onnx", provider, cache=False)
        for batch in BATCHES:
            turns[runtime, batch] = in_session(session, {"images": pixels[:batch].numpy()})
    return turns


def theirs(model: nn.Module, pixels: Tensor, folder: Path, args: argparse.Namespace) -> Turns:
    """Another library's network."""
    turns, path = in_pytorch(model, pixels, args), folder / "theirs.onnx"
    images = as_floats(pixels)
    with quietly(), torch.no_grad():
        torch.onnx.export(
            model, (images[:2],), path, dynamo=True, verbose=False, external_data=False,
            dynamic_shapes=({0: torch.export.Dim("N")},),
        )  # fmt: skip
    for runtime, run in (("onnxruntime", in_onnxruntime(path)), ("OpenVINO", in_openvino(path))):
        for batch in BATCHES:
            turns[runtime, batch] = in_torch(run, images[:batch])
    return turns


def in_pytorch(model: nn.Module, pixels: Tensor, args: argparse.Namespace) -> Turns:
    """Eager, and compiled unless that is left out or takes too long."""
    model = model.eval().to(memory_format=torch.channels_last)
    turns: Turns = {}
    for batch in BATCHES:
        images = as_floats(pixels[:batch]).to(memory_format=torch.channels_last)
        turns["eager", batch] = in_torch(model, images)
        for key, work in compiled(model, (images,), not args.no_compile).items():
            turns[key, batch] = work
    return turns


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] round 0, contiguous."""
    return (pixels.permute(0, 3, 1, 2).float() / 64 - 2).contiguous()


def of_ours(name: str) -> list[dict[str, Any]]:
    """Who published which top-1 of a network, in percent, at which size in pixels.

    Raises:
        InputError: no such network.
    """
    name, _ = get_variant(name)
    figures = [
        {"by": figure.by, "size": figure.preprocess.crop, "top1": figure.top1}
        for figure in (RELEASES[name].figures if name in RELEASES else ())
    ]
    if name in PAPER:
        figures.append({"by": "the authors", "size": PAPER[name][1].size, "top1": PAPER[name][1].top1})
    return figures


def of_torchvision(name: str) -> list[dict[str, Any]]:
    """The same of each of torchvision's weights, by their names."""
    return [
        {
            "by": f"torchvision, {weights.name}",
            "size": weights.transforms.keywords["crop_size"],
            "top1": weights.meta["_metrics"]["ImageNet-1K"]["acc@1"],
        }
        for weights in torchvision.models.get_model_weights(name)
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """What the networks cost and what was published of them; below it, how fast they are."""
    size = result["settings"]["size"]
    costs, speeds = [], []
    for name, figures in result["models"].items():
        published = "; ".join(
            f"{figure['top1']} by {figure['by']} at {figure['size']}²"
            + (f" ({figure['gmacs']:.2f} GMACs)" if figure["size"] != size else "")
            for figure in figures["published"]
        )
        costs.append([name, f"{figures['params']:.2f}", f"{figures['gmacs']:.2f}", published or "–"])
        for row in figures["speeds"]:
            speed = row["images_per_s"][name]
            cells = [ratio(row, PEER), ratio(row, "timm")]
            speeds.append([name, row["runtime"], str(row["batch"]), f"{1e3 / speed:.1f}", f"{speed:.1f}", *cells])
    return "\n".join([
        *table(["network", "params M", f"GMACs {size}²", "top-1, published by others"], costs), "",
        *table(["network", "runtime", "batch", "ms an image", "images/s", f"/ {PEER}", "/ timm"], speeds),
    ])  # fmt: skip


if __name__ == "__main__":
    with exit_on_input_error():
        main()
