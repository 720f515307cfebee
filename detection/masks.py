"""Instance masks: COCO's polygons and run lengths to pixels, a network's masks to an image's size, and back again; no
torch here, so that checkpoints and artefacts share it.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle
from typing_extensions import TypedDict

from backbones.errors import InputError

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]  # polygons x, y, x, y, … in pixels, or run lengths
FARTHEST = 1e5  # pixels; a coordinate beyond that is none, and pycocotools would walk along the whole edge


class RunLengths(TypedDict):
    """A mask in COCO's compressed form, which JSON can hold: `size` is height, width of the image."""

    size: list[int]
    counts: str


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


class PastedMasks:
    """A network's masks as run lengths in an image's size, each made when it is asked for: what nobody asks for, such
    as those of detections below a threshold, costs nothing.

    Args:
        grids: float32 [K, 28, 28] in [0, 1], one in each box.
        boxes: float32 [K, 4] as x1, y1, x2, y2 in pixels of the image.
        size: h, w of the image.
    """

    def __init__(self, grids: npt.NDArray[np.float32], boxes: npt.NDArray[np.float32], size: tuple[int, int]):
        assert len(grids) == len(boxes)
        self.grids, self.boxes, self.size = grids, boxes, size

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: int) -> RunLengths:
        return encode([paste(self.grids[index], self.boxes[index], self.size)])[0]

    def __iter__(self) -> Iterator[RunLengths]:
        return (self[i] for i in range(len(self)))


def paste(grid: npt.NDArray[np.float32], box: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A mask [28, 28] in [0, 1] as uint8 [h, w], 1 where it is above one half.

    torchvision's `paste_masks_in_image` in NumPy, operation by operation in float32, for the same pixels; of one mask
    at a time, and no more of it than lies in the image, since its K float masks of a large photograph are gigabytes.

    Args:
        box: [4] as x1, y1, x2, y2 in pixels of the image.
        size: h, w of the image.
    """
    (h, w), side = size, len(grid) + 2
    framed = np.pad(grid, 1)  # so that a mask ends softly at its box, which grows by as much
    half = (box[2:] - box[:2]) * np.float32(0.5) * np.float32(side / len(grid))
    centre = (box[2:] + box[:2]) * np.float32(0.5)
    left, top = (int(value) for value in centre - half)
    right, bottom = (int(value) for value in centre + half)
    x0, x1, x = _neighbours(side, left, right, w)
    y0, y1, y = _neighbours(side, top, bottom, h)
    pixels = np.zeros((w, h), np.uint8)  # by columns, as run lengths are
    wide = framed.T[x0] * (1 - x)[:, None] + framed.T[x1] * x[:, None]  # [columns in the image, side]
    values = wide[:, y0] * (1 - y)  # [columns, rows in the image]
    values += wide[:, y1] * y
    first_x, first_y = max(left, 0), max(top, 0)
    pixels[first_x : first_x + len(x), first_y : first_y + len(y)] = values > 0.5
    return pixels.T


def _neighbours(
    side: int, first: int, last: int, limit: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Of bilinear resizing of `side` values to the pixels first … last, for those within 0 … limit: the two values
    that a pixel lies between, and how far it is from the first.
    """
    stretched = max(1, last - first + 1)
    inside = np.arange(max(first, 0), min(first + stretched, limit)) - first
    at = (inside.astype(np.float32) + np.float32(0.5)) * np.float32(side / stretched) - np.float32(0.5)
    at = at.clip(0)
    below = at.astype(np.int64)
    return below, np.minimum(below + 1, side - 1), at - below.astype(np.float32)


def encode(masks: Iterable[npt.NDArray[np.uint8]]) -> list[RunLengths]:
    """Masks uint8 [h, w] as COCO's compressed run lengths."""
    runs = (rle.encode(np.asfortranarray(mask)) for mask in masks)
    return [{"size": [int(side) for side in run["size"]], "counts": run["counts"].decode()} for run in runs]
