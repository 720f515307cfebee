"""Top-1 and top-5, counted the same way for a checkpoint, an artefact, an endpoint and a batch job; no torch here."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from backbones.errors import InputError


def rank(logits: npt.NDArray[np.floating[Any]], k: int) -> npt.NDArray[np.int64]:
    """The `k` best classes of each row, best first; [N, C] -> [N, min(k, C)].

    Of equal logits the lower index comes first, so that the ranking is the same everywhere.

    Raises:
        InputError: a logit is not finite; broken weights, not a wrong answer.
    """
    if not np.isfinite(logits).all():
        raise InputError("the model's logits are not finite: its weights are broken or training diverged")
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


class Accuracy:
    """Counts of right answers, overall and per class; fractions, not percent."""

    def __init__(self, classes: Sequence[str]):
        self.classes = classes
        self.total = np.zeros(len(classes), dtype=np.int64)
        self.right1 = np.zeros_like(self.total)
        self.right5 = np.zeros_like(self.total)

    def update(self, ranked: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        """`ranked` [N, >= min(5, C)] as `rank` gives it, `targets` [N]."""
        hits = ranked[:, :5] == targets[:, None]  # [N, 5]
        np.add.at(self.total, targets, 1)
        np.add.at(self.right1, targets, hits[:, 0])
        np.add.at(self.right5, targets, hits.any(axis=1))

    def compute(self) -> dict[str, Any]:
        """top-1 and top-5 over all images, and of each class that has any."""
        images = int(self.total.sum())
        assert images, "an accuracy needs at least one image"
        return {
            "top1": int(self.right1.sum()) / images,
            "top5": int(self.right5.sum()) / images,
            "images": images,
            "per_class": {
                name: {"images": int(n), "top1": int(a) / int(n), "top5": int(b) / int(n)}
                for name, n, a, b in zip(self.classes, self.total, self.right1, self.right5, strict=True)
                if n
            },
        }
