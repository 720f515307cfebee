"""How near networks come to what the device can do: its own measured copy bandwidth and matrix rates are the roof.

    python -m benchmarks.roofline [--models cspresnet50 …] [--batch-sizes 1 8 64] [--rounds 3] [--device cuda]
        [--no-compile] [--json FILE]

The roof is measured in the same run: bytes a second of a copy, and FLOP/s of a product of two large square matrices in
each precision. The least time of a layer is that of its arithmetic or that of its bytes, whichever is longer (Williams
et al., "Roofline", CACM 52(4), 2009), and a network's the sum over its layers. Bytes are those of inputs, weights and
outputs of convolutions, linear layers and poolings, each once; norms, activations, additions and concatenations count
nothing, as if fused into these. PyTorch runs channels_last on pixels that lie on the device, eagerly and by
torch.compile (on CUDA with graphs). On a CPU float32 alone is measured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.arithmetic import tensor_float32
from backbones.checkpoint import device_name, pick_device
from backbones.cli import at_least
from backbones.cspnet import create_model
from backbones.errors import exit_on_input_error
from backbones.files import versions, write_json
from backbones.published import protocol
from benchmarks.contest import table, take_turns
from benchmarks.detection import finish
from benchmarks.export import compile_frozen
from serving.runtime import usable_cores

MODELS = ("cspresnet50", "cspresnext50", "cspdarknet50")
COPIED = 256 * 2**20  # bytes, more than caches hold
SIDES = {"cuda": 8192, "cpu": 2048}  # of the matrices
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Layer:
    """Multiply-adds, and numbers that go in and out, of an image; numbers of the weights."""

    macs: int
    moved: int
    weights: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=(1, 8, 64))
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(usable_cores())
    device = pick_device(args.device)
    precisions = tuple(TYPES) if device.type == "cuda" else ("fp32",)
    result: dict[str, Any] = {
        "device": device_name(device),
        "settings": vars(args) | {"json": None}, "versions": versions("torch"),
        "bytes_per_s": copy_rate(device), "flops": {name: matrix_rate(device, name) for name in precisions},
        "networks": [],
    }  # fmt: skip
    print(json.dumps({key: result[key] for key in ("device", "bytes_per_s", "flops")}), flush=True)
    for name in args.models:
        for size in args.batch_sizes:
            for precision in precisions:
                row = measure(name, size, precision, device, args)
                row |= bounds(layers(name, row["side"]), size, TYPES[precision].itemsize, result, precision)
                result["networks"].append(row)
                print(json.dumps(row), flush=True)
                if args.json:  # what there is, should the time run out
                    write_json(args.json, result)
    print(markdown(result))


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source, target = (torch.zeros(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPIED / _seconds(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a product of two square matrices."""
    side = SIDES[device.type]
    a, b = (torch.rand(side, side, device=device, dtype=TYPES[precision]) for _ in range(2))
    with tensor_float32(precision == "tf32"):
        return 2 * side**3 / _seconds(lambda: torch.mm(a, b), device)


def _seconds(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Of one call, the median."""
    taken = []
    for _ in range(2 + rounds):
        finish(device)
        began = time.perf_counter()
        work()
        finish(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


@torch.no_grad()
def layers(name: str, side: int) -> list[Layer]:
    """The layers that have to read and write, in the order in which they run."""
    with torch.device("meta"):
        network = create_model(name).eval()
    found: list[Layer] = []

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weighs = isinstance(module, nn.Conv2d | nn.Linear)
        macs = output.numel() * module.get_parameter("weight")[0].numel() if weighs else 0
        weights = sum(parameter.numel() for parameter in module.parameters())
        found.append(Layer(macs, inputs[0].numel() + output.numel(), weights))

    counted = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    for module in network.modules():
        if isinstance(module, counted):
            module.register_forward_hook(add)
    network(torch.empty(1, 3, side, side, device="meta"))
    return found


def bounds(network: Sequence[Layer], batch: int, width: int, roof: dict[str, Any], precision: str) -> dict[str, float]:
    """FLOPs and bytes of a batch, numbers being `width` bytes wide, and the least seconds under the roof."""
    costs = [(2 * layer.macs * batch, width * (layer.moved * batch + layer.weights)) for layer in network]
    rate, bandwidth = roof["flops"][precision], roof["bytes_per_s"]
    return {
        "flops": sum(flops for flops, _ in costs), "bytes": sum(moved for _, moved in costs),
        "least_s": sum(max(flops / rate, moved / bandwidth) for flops, moved in costs),
    }  # fmt: skip


def measure(name: str, batch: int, precision: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Images a second of each way to run it."""
    side = protocol(name).crop
    network = create_model(name).eval().to(device, TYPES[precision]).to(memory_format=torch.channels_last)
    images = torch.rand(batch, 3, side, side, device=device, dtype=TYPES[precision])
    images = images.contiguous(memory_format=torch.channels_last)

    def work(forward: Callable[[Tensor], object]) -> Callable[[], int]:
        @torch.inference_mode()
        def run() -> int:
            forward(images)
            finish(device)
            return batch

        return run

    contestants = {"eager": work(network)}
    with tensor_float32(precision == "tf32"):
        if not args.no_compile:
            torch._dynamo.reset()
            if device.type == "cuda":
                compiled: Any = torch.compile(network, mode="reduce-overhead", dynamic=False)
            else:
                compiled = compile_frozen(network, images)
            contestants["compiled"] = work(compiled)
            contestants["compiled"]()  # compiles it, if it is not yet
        speeds = take_turns(contestants, args.rounds)["images_per_s"]
    return {"model": name, "batch": batch, "precision": precision, "side": side, "images_per_s": speeds}


def shares(row: dict[str, Any]) -> dict[str, float]:
    """The least time over the time that each took."""
    return {name: row["least_s"] * speed / row["batch"] for name, speed in row["images_per_s"].items()}


def markdown(result: dict[str, Any]) -> str:
    """The roof; then a row a network, batch size and precision."""
    roof = [["copy, GB/s", f"{result['bytes_per_s'] / 1e9:.1f}"]]
    roof += [[f"product in {name}, TFLOP/s", f"{rate / 1e12:.3g}"] for name, rate in result["flops"].items()]
    ways = list(result["networks"][0]["images_per_s"])
    head = ["model", "batch", "precision", "GFLOP", "MB", "FLOP a byte", "at most, images/s"]
    head += [text for way in ways for text in (f"{way}, images/s", "of the roof")]
    rows = []
    for row in result["networks"]:
        costs = row["flops"] / 1e9, row["bytes"] / 1e6, row["flops"] / row["bytes"], row["batch"] / row["least_s"]
        reached = [
            text for way, share in shares(row).items() for text in (f"{row['images_per_s'][way]:.4g}", f"{share:.0%}")
        ]
        cells = [f"{cost:.4g}" for cost in costs]
        rows.append([row["model"], str(row["batch"]), row["precision"], *cells, *reached])
    return "\n".join([*table([f"of {result['device']}", "measured"], roof), "", *table(head, rows)])


if __name__ == "__main__":
    with exit_on_input_error():
        main()
