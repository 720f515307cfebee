"""What a network costs: parameters and multiply-adds, counted on the meta device, without memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.cspnet import VARIANTS, create_model


@dataclass(frozen=True)
class Profile:
    """`params` in millions, `gmacs` in billions."""

    params: float
    gmacs: float


def profile(name: str, size: int, num_classes: int = 1000) -> Profile:
    """Cost of one image of `size` x `size` pixels.

    GMACs count the multiply-adds of convolutions and linear layers and two a BatchNorm output, which is how
    the published figures were counted (fvcore's convention).
    """
    with torch.device("meta"):
        model = create_model(name, num_classes).eval()
        image = torch.empty(1, 3, size, size)
    norms = [0]

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            norms[0] += output.numel()

    for module in model.modules():
        module.register_forward_hook(count)
    with FlopCounterMode(display=False) as flops:
        model(image)
    macs = flops.get_total_flops() // 2 + 2 * norms[0]
    params = sum(parameter.numel() for parameter in model.parameters())
    return Profile(params / 1e6, macs / 1e9)


def table() -> str:
    """The variants with their cost and every published accuracy with its protocol."""
    head = ("model", "params M", "GMACs 224", "GMACs 256", "top-1", "top-5")
    lines = ["{:<14}{:>9}{:>11}{:>11}{:>9}{:>9}  published by: protocol".format(*head)]
    for name, variant in VARIANTS.items():
        small, large = profile(name, 224), profile(name, 256)
        cost = f"{name:<14}{small.params:>9.2f}{small.gmacs:>11.2f}{large.gmacs:>11.2f}"
        rows = [f"{p.top1:>9.3f}{p.top5:>9.3f}  {p.by}: {p.preprocess}" for p in variant.published]
        lines.append(cost + (rows[0] if rows else f"{'-':>9}{'-':>9}  ours; no published weights"))
        lines.extend(" " * len(cost) + row for row in rows[1:])
    return "\n".join(lines)
