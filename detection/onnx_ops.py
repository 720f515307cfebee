"""Top-k and NMS of static size, and what NMS becomes in ONNX.

torch.export cannot trace on from a size that depends on the data, as that of `nms` does, and the k of a top-k must not
depend on the canvas. These two fill up instead.

Shapes: N images, M values to choose from, B images or (image, level) or (image, class) pairs, C classes, S candidates.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

# Scores are probabilities, so a negative one marks a row that is no candidate.
REJECTED = -1.0


@torch.library.custom_op("cspnet::nms_keep", mutates_args=())
def nms_keep(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_per_class: int,
    labels: Tensor | None = None,
    num_classes: int = 1,
) -> Tensor:
    """Non-maximum suppression, each of B by itself, and in it each class.

    Args:
        boxes: [B,S,4] as (x1,y1,x2,y2).
        scores: [B,S], negative for what is no candidate.
        iou_threshold: a box goes if its IoU with a better one is greater than this.
        max_per_class: keep no more than the best so many of one class.
        labels: [B,S] below num_classes; None is one class.

    Returns:
        [B,S] bool, true for what is kept.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    candidates = scores >= 0
    for b in candidates.any(-1).nonzero()[:, 0].tolist():
        index = candidates[b].nonzero()[:, 0]
        groups = [index]
        if labels is not None:
            classes = labels[b, index]
            groups = [index[classes == c] for c in classes.unique()]
        for group in groups:
            kept = nms(boxes[b, group], scores[b, group], iou_threshold)
            keep[b, group[kept[:max_per_class]]] = True
    return keep


@nms_keep.register_fake
def _(boxes: Tensor, scores: Tensor, *_: object) -> Tensor:
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

    def onnx_nms_keep(
        boxes: Any, scores: Any, iou_threshold: float, max_per_class: int, labels: Any = None, num_classes: int = 1
    ) -> Any:
        per_class = op.Unsqueeze(scores, op.Constant(value_ints=[1]))  # [B,1,S]
        if labels is not None:
            classes = op.Constant(value=onnx_ir.tensor([[c] for c in range(num_classes)]))  # [C,1]
            own = op.Equal(op.Unsqueeze(labels, op.Constant(value_ints=[1])), classes)  # [B,C,S]
            per_class = op.Where(own, per_class, op.Constant(value_float=REJECTED))
        kept = op.NonMaxSuppression(  # [M,3]: image, class, box
            boxes,
            per_class,
            op.Constant(value_ints=[max_per_class]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[REJECTED / 2]),
        )
        kept = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)  # a box has one class: [M,2]
        nothing = op.ConstantOfShape(op.Shape(scores), value=onnx_ir.tensor([False]))
        true = op.ConstantOfShape(op.Shape(kept, start=0, end=1), value=onnx_ir.tensor([True]))
        return op.ScatterND(nothing, kept, true)

    return {torch.ops.cspnet.nms_keep.default: onnx_nms_keep}
