"""Top-1, top-5, ReaL accuracy and calibration, counted the same way for a checkpoint, an artefact, an endpoint and
a batch job; no torch here.

Shapes: N images, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backbones.errors import InputError

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


def rank(logits: Floats, k: int) -> Ints:
    """The `k` best classes of each row, best first; [N, C] -> [N, min(k, C)].

    Of equal logits the lower index comes first, so that the ranking is the same everywhere.

    Raises:
        InputError: a logit is not finite; broken weights, not a wrong answer.
    """
    if not np.isfinite(logits).all():
        raise InputError("the model's logits are not finite: its weights are broken or training diverged")
    if 20 * k > logits.shape[1]:
        return np.argsort(-logits, axis=1, kind="stable")[:, :k]
    # A few of many: the best, k times over, is 30 times as fast as a sort. argmax takes the lower of equals, too.
    left, rows = logits.copy(), np.arange(len(logits))
    best = np.empty((len(logits), k), dtype=np.int64)
    for place in range(k):
        best[:, place] = left.argmax(axis=1)
        left[rows, best[:, place]] = -np.inf
    return best


def confidence(logits: Floats) -> npt.NDArray[np.float32]:
    """The softmax's largest value in each row; [N, C] -> [N]."""
    above = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float32)
    return 1 / above.sum(axis=1)


class Accuracy:
    """Counts of right answers, overall and per class; fractions, not percent."""

    def __init__(self, classes: Sequence[str]):
        self.classes = classes
        self.total = np.zeros(len(classes), dtype=np.int64)
        self.right1 = np.zeros_like(self.total)
        self.right5 = np.zeros_like(self.total)

    def update(self, ranked: Ints, targets: Ints) -> None:
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


def real_accuracy(best: Ints, labels: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Share of images whose best class [N] is one of their ReaL labels; images without any are left out.

    Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159. `top1` is None where no image is left.
    """
    hits = [int(index) in real for index, real in zip(best, labels, strict=True) if real]
    return {
        "top1": sum(hits) / len(hits) if hits else None,
        "images": len(hits),
        "without_label": len(labels) - len(hits),
    }


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in bins of equal width; bin m of M holds confidences in ((m - 1) / M, m / M].

    Attributes:
        images: int64 [M], how many each bin holds.
        confidence: float64 [M], their mean; 0 of an empty bin.
        accuracy: float64 [M], the share of right answers; 0 of an empty bin.
    """

    images: Ints
    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]

    @property
    def ece(self) -> float:
        """The expected calibration error: |accuracy - confidence|, averaged over the images."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.images * gaps).sum() / self.images.sum())


def calibrate(confidences: Floats, right: npt.NDArray[np.bool_], bins: int = 15) -> Calibration:
    """Calibration of answers with `confidences` [N] in (0, 1], `right` [N] or not.

    Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599.
    """
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    index = np.searchsorted(edges, confidences, side="left")  # an edge belongs to the bin below it
    images = np.bincount(index, minlength=bins)
    some = np.maximum(images, 1)
    sums = np.bincount(index, confidences.astype(np.float64), bins), np.bincount(index, right.astype(np.float64), bins)
    return Calibration(images, sums[0] / some, sums[1] / some)


@dataclass(frozen=True)
class Outcomes:
    """What became of each image.

    Attributes:
        files: their names, [M].
        indices: int64 [M], positions in the data set.
        targets: int64 [M].
        ranked: int64 [M, min(5, C)], the best classes, best first.
        confidence: float32 [M], the softmax of the best.
        classes: the names of all classes that the network has, [C].
    """

    files: Sequence[str]
    indices: Ints
    targets: Ints
    ranked: Ints
    confidence: npt.NDArray[np.float32]
    classes: Sequence[str]
