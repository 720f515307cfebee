"""Faster and Mask R-CNN from features to candidates and masks: torchvision's RPN and RoIHeads over a batch.

Shapes: N images, h x w feature map of one level, L levels, A anchors per cell, C classes (background included), D
channels, k candidates kept per level, R proposals per image, M of all images' regions that are none of the padding,
S candidates per image, K detections per image.

Source: torchvision 0.29, `models/detection/{rpn,roi_heads}.py`, `ops/poolers.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.ops import Conv2dNormActivation, MultiScaleRoIAlign, roi_align

from detection.boxes import anchors_at, at_least, clip, decoder, per_anchor, take, take_anchors
from detection.onnx_ops import REJECTED, nms_keep, topk_padded

# torchvision writes this one as a literal, in RoIHeads.postprocess_detections. Pixels.
ROI_MIN_SIZE = 1e-2


class RegionHeads(nn.Module):
    """The RPN and the box head of a Faster R-CNN."""

    cell_anchors: Tensor

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.rpn_head = model.rpn.head
        self.rpn_decode = decoder(model.rpn.box_coder)
        self.rpn_score_thresh = model.rpn.score_thresh
        self.rpn_nms_thresh = model.rpn.nms_thresh
        self.rpn_min_size = model.rpn.min_size
        self.pre_nms_top_n = model.rpn.pre_nms_top_n()
        self.post_nms_top_n = model.rpn.post_nms_top_n()
        # One head serves all levels, so all have the same number of anchors: [L,A,4].
        self.register_buffer("cell_anchors", torch.stack(model.rpn.anchor_generator.cell_anchors))
        self.roi_pool = RoIPool(model.roi_heads.box_roi_pool)
        self.box_head = folded(model.roi_heads.box_head)
        self.box_predictor = model.roi_heads.box_predictor
        self.decode = decoder(model.roi_heads.box_coder)
        self.score_thresh = model.roi_heads.score_thresh
        self.nms_thresh = model.roi_heads.nms_thresh
        self.detections_per_image = model.roi_heads.detections_per_img

    def forward(
        self, features: dict[str, Tensor], sizes: Tensor, canvas: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [N,S,4], scores [N,S] (REJECTED where NMS drops them) and labels [N,S]."""
        boxes, scores = self.raw(features, sizes, canvas)
        n, r, foreground = scores.shape  # C-1
        # Each class of each image is an NMS problem of its own.
        boxes = boxes.transpose(1, 2).reshape(-1, r, 4)  # [N*(C-1),R,4]
        scores = scores.transpose(1, 2).reshape(-1, r)  # [N*(C-1),R]
        candidate = (scores > self.score_thresh) & at_least(boxes, ROI_MIN_SIZE)
        scores = torch.where(candidate, scores, REJECTED)
        keep = nms_keep(boxes, scores, self.nms_thresh, self.detections_per_image)
        scores = torch.where(keep, scores, REJECTED).reshape(n, -1)  # [N,(C-1)*R]
        labels = torch.arange(1, foreground + 1, device=scores.device)[:, None]
        return boxes.reshape(n, -1, 4), scores, labels.expand(n, foreground, r).flatten(1)

    def raw(self, features: dict[str, Tensor], sizes: Tensor, canvas: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Boxes [N,R,C-1,4] and scores [N,R,C-1] of the proposals' foreground classes; zeros past the proposals."""
        proposals, found = self.propose(list(features.values()), sizes, canvas)
        n, r = found.shape
        pooled, rows = self.roi_pool(features, proposals, found)  # [M,D,7,7]
        logits, deltas = self.box_predictor(self.box_head(pooled))  # [M,C], [M,C*4]
        boxes = self.decode(deltas[None], proposals.flatten(0, 1)[rows][None])[0].unflatten(1, (-1, 4))  # [M,C,4]
        boxes = spread(boxes[:, 1:], rows, n * r).view(n, r, -1, 4)
        scores = spread(logits.softmax(-1)[:, 1:], rows, n * r).view(n, r, -1)
        return clip(boxes.flatten(1, 2), sizes).view_as(boxes), scores

    def propose(self, maps: list[Tensor], sizes: Tensor, canvas: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The RPN's proposals [N,R,4] and whether there is one in that row [N,R]; zeros if not."""
        all_boxes, all_scores = [], []
        for logits, deltas, cell_anchors in zip(*self.rpn_head(maps), self.cell_anchors, strict=True):
            num_anchors, grid = len(cell_anchors), logits.shape[-2:]
            # Ranked by logits, as torchvision does: large ones share the probability 1.
            logits, index = topk_padded(per_anchor(logits, num_anchors)[..., 0], self.pre_nms_top_n)  # [N,k]
            anchors = anchors_at(index, cell_anchors, grid, canvas)
            boxes = clip(self.rpn_decode(take_anchors(deltas, index, num_anchors), anchors), sizes)  # [N,k,4]
            scores = logits.sigmoid()
            candidate = at_least(boxes, self.rpn_min_size) & (scores >= self.rpn_score_thresh)
            candidate &= ~logits.isneginf()  # the padding of a level with fewer than k anchors
            all_boxes.append(boxes)
            all_scores.append(torch.where(candidate, scores, REJECTED))
        boxes, scores = torch.stack(all_boxes, 1), torch.stack(all_scores, 1)  # [N,L,k(,4)]
        # Each level of each image is an NMS problem of its own.
        keep = nms_keep(boxes.flatten(0, 1), scores.flatten(0, 1), self.rpn_nms_thresh, self.post_nms_top_n)
        scores = torch.where(keep.view_as(scores), scores, REJECTED).flatten(1)  # [N,L*k]
        scores, index = topk_padded(scores, self.post_nms_top_n)  # [N,R]
        found = scores >= 0
        return torch.where(found[..., None], take(boxes.flatten(1, 2), index), 0.0), found


class MaskHead(nn.Module):
    """The mask branch of a Mask R-CNN, run on the regions that were found and no others."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.roi_pool = RoIPool(model.roi_heads.mask_roi_pool)
        self.head = folded(model.roi_heads.mask_head)
        self.predictor = model.roi_heads.mask_predictor

    def forward(self, features: dict[str, Tensor], boxes: Tensor, labels: Tensor, found: Tensor) -> Tensor:
        """Detections' boxes [N,K,4], labels [N,K] and found [N,K] -> probabilities [N,K,28,28], zeros past them."""
        n, k = found.shape
        pooled, rows = self.roi_pool(features, boxes, found)  # [M,D,14,14]
        logits = self.predictor(self.head(pooled))  # [M,C,28,28]
        channel = torch.arange(rows.shape[0], device=rows.device) * logits.shape[1] + labels.flatten()[rows]
        masks = logits.flatten(0, 1)[channel].sigmoid()  # [M,28,28], of each one's own class
        return spread(masks, rows, n * k).unflatten(0, (n, k))


class RoIPool(nn.Module):
    """torchvision's MultiScaleRoIAlign for a padded tensor of regions instead of a list."""

    def __init__(self, pool: MultiScaleRoIAlign) -> None:
        super().__init__()
        mapper = pool.map_levels
        assert pool.scales is not None, "detection.families sets the scales, which torchvision leaves to the first call"
        self.scales: list[float] = pool.scales
        self.featmap_names = pool.featmap_names
        self.output_size = pool.output_size
        self.sampling_ratio = pool.sampling_ratio
        # FPN paper, equation 1: floor(lvl0 + log2(side / s0) + eps). As limits, and not as a logarithm, whose last bit
        # depends in onnxruntime on a value's place in the tensor, and so on the image's batch.
        self.limits = [
            mapper.s0 * 2 ** (k - mapper.lvl0 - mapper.eps) for k in range(mapper.k_min + 1, mapper.k_max + 1)
        ]

    def forward(self, features: dict[str, Tensor], boxes: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Pool the boxes [N,R,4], in pixels of the canvas, where found [N,R].

        Returns:
            [M,D,*output_size], level by level, and [M], the row of N*R that each is of.
        """
        n, r = found.shape
        image = torch.arange(n, device=boxes.device)[:, None, None].expand(n, r, 1)
        rois = torch.cat((image.to(boxes), boxes), -1).flatten(0, 1)  # [N*R,5]
        side = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sqrt()  # [N,R]
        level_of = torch.zeros_like(side, dtype=torch.int64)
        for limit in self.limits:
            level_of = level_of + (side >= limit)
        level_of = torch.where(found, level_of, -1).flatten()  # [N*R]
        pooled, rows = [], []
        for level, (name, scale) in enumerate(zip(self.featmap_names, self.scales, strict=True)):
            index = torch.where(level_of == level)[0]
            pooled.append(roi_align(features[name], rois[index], self.output_size, scale, self.sampling_ratio))
            rows.append(index)
        return torch.cat(pooled), torch.cat(rows)


def folded(head: nn.Module) -> nn.Module:
    """A head whose BatchNorms are part of its convolutions: PyTorch's asks whether there is any region at all, which
    cannot be traced.
    """
    for block in head.modules():
        if isinstance(block, Conv2dNormActivation) and isinstance(block[1], _BatchNorm):
            block[0], block[1] = fuse_conv_bn_eval(block[0], block[1]), nn.Identity()
    return head


def spread(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """x [M,*] as the rows `rows` [M] of a tensor of `size` rows; the others are zeros."""
    return x.new_zeros(size, *x.shape[1:]).index_put((rows,), x)
