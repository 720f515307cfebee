"""What the benchmarks share: contestants that take turns, random weights that find objects, and tables."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from detection.families import Detector

TURN_S = 0.5  # at least
SPREAD = 2.0  # the standard deviation of excited logits


def take_turns(contestants: dict[str, Callable[[], int]], rounds: int) -> dict[str, Any]:
    """Images a second of each, the median of `rounds`, and the medians of the first's speed over each other's.

    A turn is as many calls as take half a second.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(1 + rounds):
        names = list(contestants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # who comes first changes
            images, start = 0, time.perf_counter()
            while (seconds := time.perf_counter() - start) < TURN_S:
                images += contestants[name]()
            if turn:  # the first round warms up
                speeds[name].append(images / seconds)
    ours, *others = speeds
    ratios = {name: [a / b for a, b in zip(speeds[ours], speeds[name], strict=True)] for name in others}
    return {
        "images_per_s": {name: statistics.median(values) for name, values in speeds.items()},
        "ours_over": {name: statistics.median(values) for name, values in ratios.items()},
        "spread": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


@torch.inference_mode()
def excite(model: Detector, images: list[Tensor]) -> None:
    """Make random weights find objects in `images` [3, h, w]: classes' logits that spread round 0."""
    outputs: dict[nn.Module, list[Tensor]] = {}  # one head may serve several levels
    layers = [layer for name, layer in model.named_modules() if name.endswith(("cls_logits", "cls_score"))]
    for layer in layers:
        layer.get_parameter("bias").zero_()
    hooks = [
        layer.register_forward_hook(lambda each, _, logits: outputs.setdefault(each, []).append(logits.flatten()))
        for layer in layers
    ]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.get_parameter("weight").mul_(SPREAD / torch.cat(outputs[layer]).std())
    if not isinstance(model, FasterRCNN):
        model.score_thresh = 0.5


def ratio(turns: dict[str, Any], other: str) -> str:
    """The first's speed over another's with the spread, of what `take_turns` gave; a dash for who was not there."""
    if other not in turns["ours_over"]:
        return "–"
    return with_spread(turns["ours_over"][other], *turns["spread"][other])


def with_spread(middle: float, low: float, high: float) -> str:
    return f"{middle:.2f} ({low:.2f}…{high:.2f})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
