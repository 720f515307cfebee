"""A detector's training plan: batches of images of like shape, since the largest sets the size of all."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backbones.config import Recipe
from backbones.plan import Plan


class GroupedPlan(Plan):
    """A `Plan` whose batches are of images of one group of aspect ratios, as in torchvision's reference training.

    A step still takes every image once. What is left of the groups when no whole batch can be made of it makes
    batches of neighbouring groups; torchvision fills up with images of the group that the epoch has had already.
    Which images share a step depends on the division into batches, as it does not with a single group.

    Args:
        ratios: of each image, height to width or the other way round.
        groups: to either side of 1, between it and 2 to 1; what lies beyond makes one more. 0 for no groups.
    """

    def __init__(self, train: Recipe, ratios: Sequence[float], batch: int, seed: int, groups: int):
        super().__init__(train, len(ratios), batch, seed)
        self.groups = group_ratios(ratios, groups)

    def describe(self) -> str:
        """The plan in a few lines."""
        sizes = [str(count) for _, count in sorted(Counter(self.groups).items())]
        return super().describe() + (f"\nimages by aspect ratio: {', '.join(sizes)}" if len(sizes) > 1 else "")

    def arrange(self, images: Tensor) -> Tensor:
        """The images [n] batch by batch, each batch of one group; the batches follow their first images."""
        shuffled = images.tolist()
        waiting: dict[int, list[int]] = defaultdict(list)  # positions
        batches = []
        for position, image in enumerate(shuffled):
            group = waiting[self.groups[image]]
            group.append(position)
            if len(group) == self.batch:
                batches.append(group.copy())
                group.clear()
        left = [position for group in sorted(waiting) for position in waiting[group]]
        batches += [left[start : start + self.batch] for start in range(0, len(left), self.batch)]
        return torch.tensor([shuffled[position] for batch in sorted(batches, key=min) for position in batch])


def group_ratios(ratios: Sequence[float], groups: int) -> list[int]:
    """The group of each aspect ratio: bounds lie evenly by their logarithm from 1/2 to 2, `groups` to either side of 1.

    All are of one group with `groups` of 0.
    """
    if not groups:
        return [0] * len(ratios)
    numbers: list[int] = np.digitize(ratios, 2 ** np.linspace(-1, 1, 2 * groups + 1)).tolist()
    return numbers
