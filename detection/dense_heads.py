"""RetinaNet and FCOS from features to candidates: their heads and postprocess_detections over a batch.

Shapes: N images, h x w feature map of one level, A anchors per cell, C classes (background included), k candidates kept
per level, S candidates per image.

Source: torchvision 0.29, `models/detection/{retinanet,fcos}.py`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet

from detection.boxes import anchors_at, clip, decoder, per_anchor, take_anchors
from detection.onnx_ops import REJECTED, nms_keep, topk_padded


class Level(NamedTuple):
    """What the heads say of one level, as their convolutions give it."""

    logits: Tensor  # [N,A*C,h,w]
    deltas: Tensor  # [N,A*4,h,w]
    centerness: Tensor | None  # [N,A,h,w] logits, of FCOS
    cell_anchors: Tensor  # [A,4]


class DenseHeads(nn.Module):
    """The heads of a RetinaNet or an FCOS, and the choice of their best (anchor, class) pairs."""

    cell_anchors: Tensor

    def __init__(self, model: RetinaNet | FCOS) -> None:
        super().__init__()
        self.classification, self.regression = model.head.classification_head, model.head.regression_head
        self.is_fcos = isinstance(model, FCOS)
        self.num_classes = self.classification.num_classes
        self.decode = decoder(model.box_coder)
        self.score_thresh = model.score_thresh
        self.nms_thresh = model.nms_thresh
        self.topk_candidates = model.topk_candidates
        self.detections_per_image = model.detections_per_img
        # One head serves all levels, so all have the same number of anchors: [L,A,4].
        self.register_buffer("cell_anchors", torch.stack(model.anchor_generator.cell_anchors))

    def forward(
        self, features: dict[str, Tensor], sizes: Tensor, canvas: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [N,S,4], scores [N,S] (REJECTED where NMS drops them) and labels [N,S]."""
        levels = []
        for level in self.levels(features):
            scores, index, labels = self.best_pairs(level)
            num_anchors = len(level.cell_anchors)
            anchors = anchors_at(index, level.cell_anchors, level.logits.shape[-2:], canvas)
            boxes = self.decode(take_anchors(level.deltas, index, num_anchors), anchors)
            levels.append((boxes, scores, labels))
        boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        boxes = clip(boxes, sizes)  # [N,S,4]
        scores = torch.where(scores > self.score_thresh, scores, REJECTED)  # [N,S]
        keep = nms_keep(boxes, scores, self.nms_thresh, self.detections_per_image, labels, self.num_classes)
        return boxes, torch.where(keep, scores, REJECTED), labels

    def raw(self, features: dict[str, Tensor], sizes: Tensor, canvas: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Boxes [N,M,4] and scores [N,M,C] of all levels' M anchors."""
        boxes, scores = [], []
        for level in self.levels(features):
            logits, deltas = (per_anchor(x, len(level.cell_anchors)) for x in (level.logits, level.deltas))
            centerness = level.centerness
            index = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[0], -1)
            anchors = anchors_at(index, level.cell_anchors, level.logits.shape[-2:], canvas)
            boxes.append(clip(self.decode(deltas, anchors), sizes))
            scores.append(pair_scores(logits, None if centerness is None else per_anchor(centerness, 1)))
        return torch.cat(boxes, 1), torch.cat(scores, 1)

    def levels(self, features: dict[str, Tensor]) -> Iterator[Level]:
        """The heads' convolutions, level by level: torchvision's forward also lays all levels out as one tensor."""
        for x, cell_anchors in zip(features.values(), self.cell_anchors, strict=True):
            logits = self.classification.cls_logits(self.classification.conv(x))
            x = self.regression.conv(x)
            deltas = self.regression.bbox_reg(x)
            if self.is_fcos:
                yield Level(logits, deltas.relu(), self.regression.bbox_ctrness(x), cell_anchors)
            else:
                yield Level(logits, deltas, None, cell_anchors)

    def best_pairs(self, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """The k best (anchor, class) pairs of one level: scores, anchor indices and labels [N,k].

        First the k best anchors by their best class, then the k best pairs among those: no pair can be lost, and no
        top-k runs over h*w*A*C values.
        """
        num_anchors, k = len(level.cell_anchors), self.topk_candidates
        n, _, h, w = level.logits.shape
        best = level.logits.view(n, num_anchors, self.num_classes, h, w).amax(2)  # [N,A,h,w]
        best, anchor = topk_padded(per_anchor(pair_scores(best, level.centerness), num_anchors)[..., 0], k)  # [N,k]
        logits = take_anchors(level.logits, anchor, num_anchors)  # [N,k,C]
        centerness = None if level.centerness is None else take_anchors(level.centerness, anchor, num_anchors)
        # Where a level has fewer than k anchors, its last one fills up: count that one once.
        scores = torch.where(best[..., None] >= 0, pair_scores(logits, centerness), REJECTED)
        scores, pair = scores.flatten(1).topk(k, 1)  # [N,k]
        return scores, anchor.gather(1, pair // self.num_classes), pair % self.num_classes


def pair_scores(logits: Tensor, centerness: Tensor | None) -> Tensor:
    """Probabilities of logits; FCOS takes the geometric mean with centerness, logits that broadcast to the others."""
    if centerness is None:
        return logits.sigmoid()
    return torch.sqrt(logits.sigmoid() * centerness.sigmoid())
