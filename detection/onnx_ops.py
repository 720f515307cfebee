"""Top-k and NMS of static size, and what NMS becomes in ONNX.

torch.export cannot trace on from a size that depends on the data, as that of `nms` does, and the
k of a top-k must not depend on the canvas. These two fill up instead.

Shapes: N images, M values to choose from, B images or (image, level) or (image, class) pairs,
C classes, S candidates.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

# Scores are probabilities, so a negative one marks a row that is no candidate.
REJECTED = -1.0


@torch.library.custom_op("cspnet::nms_keep", mutates_args=())
def nms_keep(boxes: Tensor, scores: Tensor, iou_threshold: float, max_per_class: int) -> Tensor:
    """Non-maximum suppression, each image and class by itself.

    Args:
        boxes: [B,S,4] as (x1,y1,x2,y2), shared by the classes.
        scores: [B,C,S], negative for what is no candidate.
        iou_threshold: a box goes if its IoU with a better one is greater than this.
        max_per_class: keep no more than the best so many of an image and class.

    Returns:
        [B,C,S] bool, true for what is kept.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for b, c in (scores >= 0).any(-1).nonzero().tolist():
        index = torch.where(scores[b, c] >= 0)[0]
        kept = nms(boxes[b, index], scores[b, c, index], iou_threshold)
        keep[b, c, index[kept[:max_per_class]]] = True
    return keep


@nms_keep.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, max_per_class: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool)


def topk_padded(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k of x [N,M] for any M: values and indices [N,k], best first.

    Rows past M have the value -inf and index M-1, so k stays static while M depends on the canvas.
    """
    padded = torch.cat((x, x.new_full((1, 1), float("-inf")).expand(x.shape[0], k)), 1)
    values, index = padded.topk(k, 1)
    return values, index.clamp(max=x.shape[1] - 1)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` needs as custom_translation_table to write `nms_keep`."""
    import onnx_ir
    from onnxscript import opset18

    op: Any = opset18  # its types know of arrays only, not of values in a graph

    def onnx_nms_keep(boxes: Any, scores: Any, iou_threshold: float, max_per_class: int) -> Any:
        kept = op.NonMaxSuppression(  # [M,3]: image, class, box
            boxes,
            scores,
            op.Constant(value_ints=[max_per_class]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[REJECTED / 2]),
        )
        nothing = op.ConstantOfShape(op.Shape(scores), value=onnx_ir.tensor([False]))
        true = op.ConstantOfShape(op.Shape(kept, start=0, end=1), value=onnx_ir.tensor([True]))
        return op.ScatterND(nothing, kept, true)

    return {torch.ops.cspnet.nms_keep.default: onnx_nms_keep}
