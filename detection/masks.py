"""Instance masks: COCO's polygons and run lengths to pixels, a network's masks to an image's size, and back again."""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as rle
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from backbones.errors import InputError

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]  # polygons x, y, x, y, … in pixels, or run lengths


def is_polygon(points: object) -> bool:
    """Three points or more, each with its two finite coordinates."""
    if not isinstance(points, list | array) or len(points) < 6 or len(points) % 2:
        return False
    numbers = isinstance(points, array) or all(type(value) in (int, float) for value in points)  # True is none
    return numbers and math.isfinite(sum(points))  # NaN and infinity stay in a sum


def is_usable(segmentation: object, size: tuple[int, int] | None) -> bool:
    """Whether `decode` takes it, as far as that shows without decoding: one polygon at least, or run lengths of the
    image's `size` (height, width).
    """
    if isinstance(segmentation, Mapping):
        stated = segmentation.get("size")
        whole = isinstance(segmentation.get("counts"), Sequence) and isinstance(stated, list) and len(stated) == 2
        return whole and (size is None or tuple(segmentation["size"]) == size)
    return isinstance(segmentation, Sequence) and any(map(is_polygon, segmentation))


def to_rle(segmentation: Segmentation, h: int, w: int) -> dict[str, Any]:
    """pycocotools' compressed run lengths of a segmentation; of its polygons, those that are none are left out.

    Raises:
        InputError: no polygon in it, or run lengths that are broken or not of h x w.
    """
    if not is_usable(segmentation, (h, w)):
        raise InputError(f"a segmentation has no polygon, or run lengths that are not of {w}x{h} pixels")
    if not isinstance(segmentation, Mapping):
        return rle.merge(rle.frPyObjects([list(points) for points in segmentation if is_polygon(points)], h, w))
    counts = segmentation["counts"]
    if isinstance(counts, str | bytes):
        return {"size": [h, w], "counts": counts.encode() if isinstance(counts, str) else counts}
    if any(count < 0 for count in counts) or sum(counts) != h * w:
        raise InputError(f"a segmentation's run lengths do not add up to its {w}x{h} pixels")
    return rle.frPyObjects({"size": [h, w], "counts": list(counts)}, h, w)


def decode(segmentation: Segmentation, h: int, w: int) -> npt.NDArray[np.uint8]:
    """A segmentation as uint8 [h, w], 1 on the object.

    Raises:
        InputError: as of `to_rle`.
    """
    try:
        return rle.decode(to_rle(segmentation, h, w))
    except ValueError as error:
        message = str(error) if isinstance(error, InputError) else f"a segmentation's run lengths are broken: {error}"
        raise InputError(message) from None


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """A network's masks [K, 1, 28, 28] in [0, 1] as bool [K, h, w], at one half.

    Args:
        boxes: [K, 4] as x1, y1, x2, y2 in pixels of the image.
        size: h, w of the image.
    """
    pasted = masks.new_zeros((len(masks), *size), dtype=torch.bool)
    for i in range(len(masks)):  # one by one: a hundred float masks of a large photograph are gigabytes
        pasted[i] = paste_masks_in_image(masks[i : i + 1], boxes[i : i + 1], size)[0, 0] > 0.5
    return pasted


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Masks bool [K, h, w] as COCO's compressed run lengths, their counts as text that JSON can hold."""
    pixels = masks.cpu().numpy().astype(np.uint8)
    runs = (rle.encode(np.asfortranarray(mask)) for mask in pixels)
    return [{"size": [int(side) for side in run["size"]], "counts": run["counts"].decode()} for run in runs]
