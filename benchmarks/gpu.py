"""Artefacts on TensorRT and CUDA beside PyTorch on the same GPU.

    python -m benchmarks.gpu [--models cspresnet50 …] [--batch-sizes 1 8 64] [--providers cuda tensorrt]
        [--precisions fp32 fp16 int8] [--rounds 3] [--device cuda] [--no-compile] [--json FILE]

Side by side in one run: in every round each contestant has its turn, from the same uint8 pixels in the host's memory to
results there, and the figures are medians over the rounds; "graphs" is CUDA with `cuda_graphs`. FP32 is without
TensorFloat-32 on either side, as artefacts are served. PyTorch in FP16 has its network's weights in float16, a detector
runs under autocast; torch.compile is of classifiers, with CUDA graphs. Random weights, made to find objects; INT8 has
its ranges from one input. What a provider cannot run is left out, and the reason given.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones.arithmetic import tensor_float32
from backbones.checkpoint import device_name, pick_device
from backbones.cli import at_least
from backbones.engine import normalize
from backbones.errors import InputError, exit_on_input_error
from backbones.files import versions, write_json
from benchmarks.contest import table, take_turns
from benchmarks.export import CANVAS, as_list, in_session, in_torch, quantized, random_classifier, random_detector
from detection.names import is_detector
from serving.export import ExportedClassifier, run_export
from serving.runtime import OnnxModel, usable_cores
from serving.sessions.providers import PROVIDERS

PRECISIONS = ("fp32", "fp16", "int8")
EAGER, COMPILED = "eager", "compiled"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=("cspresnet50", "fcos_cspresnet50_fpn"))
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=(1, 8, 64))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=("cuda", "tensorrt"))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(usable_cores())
    device = pick_device(args.device)
    result: dict[str, Any] = {
        "device": device_name(device),
        "settings": vars(args) | {"json": None}, "versions": versions("torch", "torchvision", "onnxruntime-gpu"),
        "models": {},
    }  # fmt: skip
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder, tensor_float32(False):
            figures: dict[str, Any] = {"left_out": {}, "batches": {}}
            result["models"][name] = figures
            for size, turns in race(name, args, device, Path(folder), figures["left_out"]):
                figures["batches"][str(size)] = turns
                print(json.dumps({name: {size: turns}}, indent=1), flush=True)
                if args.json:  # what there is, should the time run out
                    write_json(args.json, result)
    print(markdown(result))
    if args.json:
        write_json(args.json, result)


def race(
    name: str, args: argparse.Namespace, device: torch.device, folder: Path, left_out: dict[str, str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """All contestants at each batch size; why one is not among them goes to `left_out`."""
    torch.manual_seed(0)
    weights, detector = folder / "weights.safetensors", is_detector(name)
    model, pixels = random_detector(name, weights) if detector else random_classifier(name, weights)
    sample = {"images": pixels.numpy()} | ({"sizes": np.array([CANVAS])} if detector else {})
    artifacts = export(weights, folder, sample, args.precisions, left_out)

    def repeated(size: int) -> dict[str, Any]:
        return {key: np.repeat(value, size, axis=0) for key, value in sample.items()}

    extremes = max(args.batch_sizes), min(args.batch_sizes)  # TensorRT then builds twice, not at each larger batch
    sessions: dict[str, OnnxModel] = {}
    kinds = [(provider, False) for provider in args.providers]
    if "cuda" in args.providers and not detector:  # whose NMS is on the CPU, where no graph can be recorded
        kinds.append(("cuda", True))
    for provider, graphs in kinds:
        for precision, path in artifacts.items():
            title = f"{provider}{', graphs' if graphs else ''} {precision}"
            try:
                session = OnnxModel(path, provider, cache=False, cuda_graphs=graphs)
                for size in extremes:
                    session.run(**repeated(size))
            except InputError as error:
                left_out[title] = str(error).replace(f"{folder}/", "")
                print(f"{name}, {title}: {left_out[title]}", flush=True)
            else:
                sessions[title] = session
    forwards = in_pytorch(model.to(device), device, args)
    for size in args.batch_sizes:
        images = pixels.expand(size, -1, -1, -1).contiguous()
        contestants = {title: in_session(session, repeated(size)) for title, session in sessions.items()}
        for title, forward in forwards.items():
            contestants[title] = in_torch(forward, images)
            contestants[title]()  # compiles it, if that is to be
        yield size, take_turns(contestants, args.rounds)


def export(
    weights: Path, folder: Path, sample: dict[str, Any], precisions: Sequence[str], left_out: dict[str, str]
) -> dict[str, Path]:
    """The artefact in each precision."""
    artifacts = {"fp32": folder / "fp32.onnx"}
    run_export(str(weights), artifacts["fp32"])
    if "fp16" in precisions:
        try:
            run_export(str(weights), folder / "fp16.onnx", precision="fp16")
            artifacts["fp16"] = folder / "fp16.onnx"
        except InputError as error:
            left_out["fp16"] = str(error)
    if "int8" in precisions:
        artifacts["int8"] = quantized(artifacts["fp32"], sample)
    return {name: path for name, path in artifacts.items() if name in precisions}


class HalfClassifier(nn.Module):
    """uint8 [N, H, W, 3] -> logits [N, C], the network in float16."""

    def __init__(self, exported: ExportedClassifier):
        super().__init__()
        self.model, self.preprocess = copy.deepcopy(exported.model).half(), exported.preprocess

    def forward(self, images: Tensor) -> Tensor:
        return self.model(normalize(images, self.preprocess).half())


def in_pytorch(model: nn.Module, device: torch.device, args: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    """Functions of uint8 pixels [N, H, W, 3] on the host, which end when their results are there."""
    networks: dict[str, Callable[[Tensor], Any]] = {}
    if isinstance(model, ExportedClassifier):
        networks["fp32"] = model
        if device.type == "cuda":
            networks["fp16"] = HalfClassifier(model)
    else:
        networks["fp32"] = lambda images: model(as_list(images))
        if device.type == "cuda":
            networks["fp16"] = torch.autocast("cuda", torch.float16)(networks["fp32"])
    forwards = {f"{EAGER} {precision}": network for precision, network in networks.items()}
    if isinstance(model, ExportedClassifier) and not args.no_compile:
        torch._dynamo.reset()  # after some shapes of one class it would compile no more
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        forwards |= {
            f"{COMPILED} {precision}": torch.compile(network, mode=mode, dynamic=False)
            for precision, network in networks.items()
        }

    def round_trip(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda images: on_host(forward(images.to(device)))

    return {title: round_trip(forward) for title, forward in forwards.items()}


def on_host(value: Any) -> Any:
    """Tensors, also in lists and dictionaries, copied to the host."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_host(each) for key, each in value.items()}
    return [on_host(each) for each in value]


def markdown(result: dict[str, Any]) -> str:
    """Images a second; in each precision the best artefact's over the best of PyTorch; and what was left out."""
    every = [turns["images_per_s"] for figures in result["models"].values() for turns in figures["batches"].values()]
    titles = list(dict.fromkeys(title for speeds in every for title in speeds))
    both = [p for p in PRECISIONS if any(title in titles for title in (f"{EAGER} {p}", f"{COMPILED} {p}"))]
    rows, reasons = [], []
    for name, figures in result["models"].items():
        for size, turns in figures["batches"].items():
            speeds = turns["images_per_s"]
            cells = [f"{speeds[title]:.4g}" if title in speeds else "" for title in titles]
            rows.append([name, size, *cells, *(_best_over_best(speeds, precision) for precision in both)])
        reasons += [[name, title, reason] for title, reason in figures["left_out"].items()]
    lines = table(["model", "batch", *titles, *(f"artefact / PyTorch, {precision}" for precision in both)], rows)
    if reasons:
        lines += ["", *table(["model", "left out", "reason"], reasons)]
    return "\n".join(lines)


def _best_over_best(speeds: dict[str, float], precision: str) -> str:
    mine = {title: speed for title, speed in speeds.items() if title.endswith(precision)}
    pytorch = [speed for title, speed in mine.items() if title.startswith((EAGER, COMPILED))]
    artefacts = [speed for title, speed in mine.items() if not title.startswith((EAGER, COMPILED))]
    return f"{max(artefacts) / max(pytorch):.2f}" if pytorch and artefacts else ""


if __name__ == "__main__":
    with exit_on_input_error():
        main()
