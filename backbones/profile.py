"""What a network costs: counted on the meta device, without memory, and timed beside its plain twin."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backbones.cspnet import CSPNet, create_model, get_variant
from backbones.errors import InputError
from backbones.published import PAPER, PLAIN, RELEASES
from backbones.variants import VARIANTS

WARM_UP = 2


@dataclass(frozen=True)
class Profile:
    """What a network costs.

    Attributes:
        params: millions.
        gmacs: billions of multiply-adds an image, of convolutions and linear layers and two a BatchNorm output, which
            is how the published figures of timm's models were counted (fvcore's convention).
        bflops: billions an image; twice the multiply-adds of convolutions and linear layers alone, Darknet's way.
        activations: millions of numbers an image that convolutions and linear layers put out.
    """

    params: float
    gmacs: float
    bflops: float
    activations: float


def profile(model: str, size: int) -> Profile:
    """Cost of an image of `size` x `size` pixels.

    Raises:
        InputError: no such model.
    """
    return count(_on_meta(model), size)


@torch.no_grad()
def count(network: nn.Module, size: int) -> Profile:
    """Cost of an image of `size` x `size` pixels in a network on the meta device."""
    macs = norms = activations = 0

    # By hooks, though torch counts too: its FlopCounterMode looks at each operation, and takes twice the time.
    def add(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal macs, norms, activations
        if isinstance(module, nn.Conv2d | nn.Linear):
            macs += output.numel() * module.weight[0].numel()
            activations += output.numel()
        elif isinstance(module, nn.BatchNorm2d):
            norms += output.numel()

    handles = [module.register_forward_hook(add) for module in network.modules()]
    network.eval()(torch.empty(1, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    params = sum(parameter.numel() for parameter in network.parameters())
    return Profile(params / 1e6, (macs + 2 * norms) / 1e9, 2 * macs / 1e9, activations / 1e6)


def _on_meta(model: str) -> CSPNet:
    with torch.device("meta"):
        return create_model(model)


def training_mib(model: str, size: int, batch_size: int, device: torch.device) -> float:
    """MiB of a training step in float32, without the optimizer's state.

    On a CUDA device it is the allocator's peak in a real step; elsewhere it is counted, as the weights, their gradients
    and what the forward pass keeps for the backward pass, without what single operations need for themselves.

    Raises:
        InputError: too little to train on.
    """
    if batch_size * (size // 32) ** 2 < 2:
        raise InputError(
            f"one image of {size} pixels has one cell at stride 32: BatchNorm cannot train on it, give more"
        )
    if device.type == "cuda":
        network = create_model(model).to(device)
        torch.cuda.reset_peak_memory_stats(device)
        network(torch.randn(batch_size, 3, size, size, device=device)).sum().backward()
        return torch.cuda.max_memory_allocated(device) / 2**20
    network, image = _on_meta(model), torch.empty(1, 3, size, size, device="meta")
    weights = sum(parameter.nbytes for parameter in network.parameters())
    return (2 * weights + batch_size * _kept(network, image)) / 2**20


def _kept(network: CSPNet, image: Tensor) -> int:
    """Bytes of all distinct tensors that autograd keeps for the backward pass, weights left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors stay referenced, so that no storage's address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(image.expand(2, -1, -1, -1)).sum()  # BatchNorm wants more than one value a channel
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights) // 2


def latencies(models: Sequence[str], size: int, device: torch.device, batch_size: int, runs: int) -> dict[str, float]:
    """Milliseconds of one forward pass of each model over a batch, the median of `runs`.

    The models take turns, so that what else the machine does falls on all of them.
    """
    networks = {name: create_model(name).to(device).eval() for name in models}
    images = torch.randn(batch_size, 3, size, size, device=device)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(WARM_UP + runs):
            for name, network in networks.items():
                start = time.perf_counter()
                network(images)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn >= WARM_UP:
                    times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def compare(
    models: Sequence[str],
    size: int | None,
    device: torch.device,
    *,
    batch_size: int = 1,
    training_batch: int = 32,
    runs: int = 10,
) -> list[dict[str, Any]]:
    """A row a network, each CSP network after its plain twin: cost, latency and what the paper says of it.

    Args:
        size: pixels of a side; None is 256, or what the paper counted a network at.
        batch_size: images of a pass whose latency is measured; `training_batch` of a step whose memory is.

    Raises:
        InputError: no such model.
    """
    rows = []
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    setting = {
        "device": on, "batch_size": batch_size, "training_batch": training_batch, "runs": runs,
        "memory": "measured" if device.type == "cuda" else "counted", "torch": torch.__version__,
    }  # fmt: skip
    for model in models:
        name, variant = get_variant(model)
        paper = PAPER.get(name.removesuffix(PLAIN))
        pixels = size or (paper[1].size if paper else 256)
        names = [name + PLAIN, name] if variant.plain else [name]
        times = latencies(names, pixels, device, batch_size, runs) if runs else {}
        for name in names:
            row = {"model": name, "size": pixels, **vars(profile(name, pixels))}
            row["training_mib"] = training_mib(name, pixels, training_batch, device)
            if name in times:
                row["latency_ms"] = times[name]
            if paper:
                row["paper"] = vars(paper[0 if name.endswith(PLAIN) else 1])
            rows.append(row | {"setting": setting})
    return rows


COLUMNS = {
    "params": "params M", "gmacs": "GMACs", "bflops": "BFLOPs", "activations": "acts M", "training_mib": "train MiB",
    "latency_ms": "latency ms",
}  # fmt: skip


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, after each pair what the CSP network saves, in percent."""
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    wide = max(len(row["model"]) for row in rows) + 2
    published = "  published: params M, BFLOPs, top-1, top-5" if any("paper" in row for row in rows) else ""
    setting = "latency of a batch of {batch_size} on {device}; memory of a step of {training_batch} images, {memory}"
    lines = [setting.format(**rows[0]["setting"])]
    lines += [f"{'':<{wide}}pixels" + "".join(f"{title:>12}" for title in columns.values()) + published]
    plain: dict[str, Any] | None = None
    for row in rows:
        line = f"{row['model']:<{wide}}{row['size']:>6}" + "".join(f"{row[key]:>12.3f}" for key in columns)
        if "paper" in row:
            line += "  {params:.2f}, {bflops:.3f}, {top1:.1f}, {top5:.1f}".format(**row["paper"])
        lines.append(line)
        if plain and plain["model"] == row["model"] + PLAIN:
            saved = "".join(f"{_saved(plain[key], row[key]):>12}" for key in columns)
            line = f"{'  saved by CSP':<{wide + 6}}{saved}"
            if "paper" in row:
                before, after = plain["paper"], row["paper"]
                line += f"  {_saved(before['params'], after['params'])}, {_saved(before['bflops'], after['bflops'])}"
                line += f", {after['top1'] - before['top1']:+.1f}, {after['top5'] - before['top5']:+.1f}"
            lines.append(line)
        plain = row
    return "\n".join(lines)


def _saved(before: float, after: float) -> str:
    return f"{100 * (1 - after / before):.1f} %"


def table() -> str:
    """The variants with their cost and every published accuracy with its protocol."""
    head = ("model", "params M", "GMACs 224", "GMACs 256", "top-1", "top-5")
    lines = ["{:<24}{:>9}{:>11}{:>11}{:>9}{:>9}  published by: protocol".format(*head)]
    for name in VARIANTS:
        network = _on_meta(name)
        small, large = count(network, 224), count(network, 256)
        cost = f"{name:<24}{small.params:>9.2f}{small.gmacs:>11.2f}{large.gmacs:>11.2f}"
        figures = RELEASES[name].figures if name in RELEASES else ()
        rows = [f"{p.top1:>9.3f}{p.top5:>9.3f}  {p.by}: {p.preprocess}" for p in figures]
        if name in PAPER:
            paper = PAPER[name][1]
            rows = [f"{paper.top1:>9.1f}{paper.top5:>9.1f}  the paper; no weights for PyTorch"]
        lines.append(cost + (rows[0] if rows else f"{'-':>9}{'-':>9}  no published weights"))
        lines.extend(" " * len(cost) + row for row in rows[1:])
    twins = sum(variant.plain is not None for variant in VARIANTS.values())
    lines.append(f"{twins} of them have a twin without cross-stage paths, from the same blocks: NAME_plain")
    return "\n".join(lines)
