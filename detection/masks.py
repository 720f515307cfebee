"""Instance masks: COCO's polygons and run lengths to pixels, a network's masks to an image's size, and back again."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

from backbones.errors import InputError

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]  # polygons x, y, x, y, … in pixels, or run lengths
FARTHEST = 1e5  # pixels; a coordinate beyond that is none, and pycocotools would walk along the whole edge


def is_polygon(points: object) -> bool:
    """Three points or more, each with its two finite coordinates."""
    if not isinstance(points, list | array) or len(points) < 6 or len(points) % 2:
        return False
    numbers = isinstance(points, array) or all(type(value) in (int, float) for value in points)  # True is none
    return numbers and max(points) < FARTHEST and min(points) > -FARTHEST and math.isfinite(sum(points))  # no NaN


def is_usable(segmentation: object, size: tuple[int, int] | None) -> bool:
    """Whether `to_rle` takes it: one polygon at least, or whole run lengths of the image's `size` (height, width), or
    of their own where that is not known.
    """
    if not isinstance(segmentation, Mapping):
        return isinstance(segmentation, Sequence) and any(map(is_polygon, segmentation))
    stated = stated_size(segmentation)
    return stated is not None and size in (None, stated) and are_whole(segmentation.get("counts"), *stated)


def stated_size(runs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width that run lengths say to have, if they can be those of an image."""
    size = runs.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return None
    return (size[0], size[1]) if size[0] * size[1] < 2**31 else None


def are_whole(counts: object, h: int, w: int) -> bool:
    """Whether run lengths, compressed or not, are of h x w pixels. pycocotools takes others, and then reads and writes
    where it must not.
    """
    if isinstance(counts, str | bytes):
        runs = _run_lengths(counts.encode() if isinstance(counts, str) else counts)
        return runs is not None and bool((runs >= 0).all()) and int(runs.sum()) == h * w
    if not isinstance(counts, list | tuple) or not all(type(run) is int and run >= 0 for run in counts):
        return False
    return sum(counts) == h * w


def _run_lengths(text: bytes) -> npt.NDArray[np.int64] | None:
    """Compressed counts as numbers, of which some may be negative; None if they are no such text.

    A number is written from its lowest five bits on, a character each, whose sixth bit says that more follow and
    whose fifth, in the last, is the sign; from the fourth number on, it is the difference to the last but one.
    """
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return None
    ends = np.flatnonzero(digits < 32)
    starts = np.r_[0, ends[:-1] + 1]
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    if shifts.max() > 30:  # longer than any image's
        return None
    runs = np.add.reduceat((digits & 31) << shifts, starts)
    runs -= np.where(digits[ends] & 16, 32 << shifts[ends], 0)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs


def to_rle(segmentation: Segmentation, h: int, w: int) -> dict[str, Any]:
    """pycocotools' compressed run lengths of a segmentation; of its polygons, those that are none are left out.

    Raises:
        InputError: no polygon in it, or run lengths that are broken or not of h x w.
    """
    if not is_usable(segmentation, (h, w)):
        raise InputError(f"a segmentation has no polygon, or run lengths that are broken or not of {w}x{h} pixels")
    if not isinstance(segmentation, Mapping):
        return rle.merge(rle.frPyObjects([list(points) for points in segmentation if is_polygon(points)], h, w))
    counts = segmentation["counts"]
    if isinstance(counts, str | bytes):
        return {"size": [h, w], "counts": counts.encode() if isinstance(counts, str) else counts}
    return rle.frPyObjects({"size": [h, w], "counts": list(counts)}, h, w)


def decode(segmentation: Segmentation, h: int, w: int) -> npt.NDArray[np.uint8]:
    """A segmentation as uint8 [h, w], 1 on the object.

    Raises:
        InputError: as of `to_rle`.
    """
    return rle.decode(to_rle(segmentation, h, w))


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[npt.NDArray[np.uint8]]:
    """A network's masks [K, 1, 28, 28] in [0, 1], one by one as uint8 [h, w], 1 where they are above one half.

    As torchvision's `paste_masks_in_image`, whose K float masks of a large photograph are gigabytes.

    Args:
        boxes: [K, 4] as x1, y1, x2, y2 in pixels of the image.
        size: h, w of the image.
    """
    h, w = size
    masks, scale = expand_masks(masks, padding=1)
    for mask, (x1, y1, x2, y2) in zip(masks, expand_boxes(boxes, scale).long().tolist(), strict=True):
        sides = (max(1, y2 - y1 + 1), max(1, x2 - x1 + 1))
        inside = functional.interpolate(mask[None], sides, mode="bilinear", align_corners=False)[0, 0] > 0.5
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, w), min(y2 + 1, h)
        pixels = np.zeros(size, np.uint8, order="F")  # as `encode` needs them
        pixels[top:bottom, left:right] = inside[top - y1 : bottom - y1, left - x1 : right - x1].cpu().numpy()
        yield pixels


def encode(masks: Iterable[npt.NDArray[np.uint8]]) -> list[dict[str, Any]]:
    """Masks uint8 [h, w] as COCO's compressed run lengths, their counts as text that JSON can hold."""
    runs = (rle.encode(np.asfortranarray(mask)) for mask in masks)
    return [{"size": [int(side) for side in run["size"]], "counts": run["counts"].decode()} for run in runs]
