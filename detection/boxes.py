"""Anchors, box decoding and choices among them for a batch of tensors; what `batched.py` and its heads share.

Shapes: N images, H x W canvas, h x w feature map of one level, A anchors per cell, D values per anchor, k chosen ones,
M boxes of an image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxLinearCoder


def decoder(coder: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """torchvision's box coder as a function: deltas [N,M,4*C] and boxes [N,M,4] -> [N,M,4*C]."""
    decode = coder.decode if isinstance(coder, BoxLinearCoder) else coder.decode_single
    return lambda deltas, boxes: decode(deltas.flatten(0, 1), boxes.flatten(0, 1)).view_as(deltas)


def per_anchor(x: Tensor, num_anchors: int) -> Tensor:
    """A head's map [N,A*D,h,w] -> [N,h*w*A,D], in torchvision's order of the anchors."""
    n, channels, h, w = x.shape
    return x.view(n, num_anchors, channels // num_anchors, h, w).permute(0, 3, 4, 1, 2).flatten(1, 3)


def take_anchors(x: Tensor, index: Tensor, num_anchors: int) -> Tensor:
    """Rows `index` [N,k] of `per_anchor(x)`, without making it: [N,A*D,h,w] -> [N,k,D]."""
    n, channels, h, w = x.shape
    depth = channels // num_anchors
    channel = (index % num_anchors)[..., None] * depth + torch.arange(depth, device=x.device)  # [N,k,D]
    place = channel * (h * w) + (index // num_anchors)[..., None]
    return x.flatten(1).gather(1, place.flatten(1)).view(n, -1, depth)


def anchors_at(index: Tensor, cell_anchors: Tensor, grid: Sequence[int], canvas: Sequence[int]) -> Tensor:
    """AnchorGenerator's anchors number `index` [N,k] of a level's h*w*A -> [N,k,4], in pixels.

    Args:
        cell_anchors: [A,4] round the origin.
        grid: h, w
        canvas: H, W
    """
    num_anchors, width = cell_anchors.shape[0], grid[1]
    cell = index // num_anchors
    row = cell // width
    column = cell - row * width  # `%` of a tensor and a symbolic size has no ONNX translation
    y, x = row * (canvas[0] // grid[0]), column * (canvas[1] // grid[1])
    return torch.stack((x, y, x, y), -1) + cell_anchors[index % num_anchors]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [N,k] of each image's x [N,M,*] -> [N,k,*]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes [N,M,4] to their image's (height, width) in sizes [N,2]."""
    return boxes.clamp(min=0).minimum(sizes[:, None, [1, 0, 1, 0]].to(boxes))


def at_least(boxes: Tensor, min_size: float) -> Tensor:
    """Whether both sides of boxes [...,4] have min_size pixels: [...], bool."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(-1)
