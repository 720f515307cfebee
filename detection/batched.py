"""torchvision's FPN detectors as one tensor function over a padded batch.

torchvision's own forward takes a list of images and returns a list of dicts, and the sizes of what
it returns depend on the data, so `torch.onnx.export(dynamo=True)` cannot trace it. Here the same
detections come with static sizes: what falls out keeps its row and gets the score REJECTED. Eager
PyTorch runs it, and ONNX export traces it. Every setting is read from the model.

Shapes, here and in the comments below:
    N images, H x W canvas (the padded size), h x w feature map of one level, L levels
    A anchors per cell, C classes (background included), D channels
    k candidates kept per level, S candidates kept per image before NMS, R proposals per image
    K detections returned per image

Sources: torchvision 0.29, `models/detection/{retinanet,fcos,rpn,roi_heads}.py`, `ops/poolers.py`.
Deviation: NMS treats each class (in the RPN each level) by itself. torchvision's `batched_nms` does
so on the CPU above 1000 boxes; below, it moves the classes apart in float32, whose rounding can
carry an IoU across the threshold.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.ops import roi_align

from backbones.errors import InputError
from detection.onnx_ops import REJECTED, nms_keep, topk_padded

# torchvision writes this one as a literal, in RoIHeads.postprocess_detections. Pixels.
ROI_MIN_SIZE = 1e-2


class BatchedDetector(nn.Module):
    """A frozen copy of a RetinaNet, FCOS or Faster R-CNN: padded batch in, padded detections out.

    The given model is copied, not shared, and may go on training. The copy is in eval mode and its
    parameters need no gradients.

    Raises:
        InputError: for any other detector, among them Mask R-CNN and Keypoint R-CNN.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval().requires_grad_(False)
        self.heads: DenseHeads | RegionHeads
        if isinstance(model, RetinaNet | FCOS):
            self.heads = DenseHeads(model)
            self.detections_per_image = model.detections_per_img
        elif isinstance(model, FasterRCNN) and not _has_more_than_boxes(model):
            self.heads = RegionHeads(model)
            self.detections_per_image = model.roi_heads.detections_per_img
        else:
            raise InputError(
                f"cannot batch or export a {type(model).__name__}, which finds more than boxes or none: supported are "
                "RetinaNet, FCOS and FasterRCNN"
            )
        self.normalize = Normalize(model.transform.image_mean, model.transform.image_std)
        self.backbone = model.backbone
        self.eval().to(next(self.parameters()).device)  # the buffers too

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detect objects, best first; rows from num_detections on are zeros.

        Args:
            images: [N,H,W,3] uint8 RGB, each image in the upper left corner of its canvas, resized.
            sizes: [N,2] int64, the (height, width) in pixels that the image fills of its canvas.

        Returns:
            boxes [N,K,4] float32 as (x1,y1,x2,y2) in pixels of the canvas, scores [N,K] float32,
            labels [N,K] int64 (torchvision's: 0 is background), num_detections [N] int64.
        """
        features = self.backbone(self.normalize(images, sizes))  # L x [N,D,h,w]
        boxes, scores, labels = self.heads(features, sizes, images.shape[1:3])
        scores, index = topk_padded(scores, self.detections_per_image)  # [N,K]
        found = scores >= 0
        boxes = torch.where(found[..., None], take(boxes, index), 0.0)  # [N,K,4]
        labels = torch.where(found, labels.gather(1, index), 0)  # [N,K]
        return boxes, torch.where(found, scores, 0.0), labels, found.sum(1)


def _has_more_than_boxes(model: FasterRCNN) -> bool:
    return model.roi_heads.has_mask() or model.roi_heads.has_keypoint()


class Normalize(nn.Module):
    """GeneralizedRCNNTransform.normalize and .batch_images over a padded batch."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """uint8 [N,H,W,3] and sizes [N,2] -> float32 [N,3,H,W], zero outside of the images."""
        height, width = images.shape[1], images.shape[2]
        # In the order and the memory layout of torchvision: the same float32 to the last bit.
        pixels = images.permute(0, 3, 1, 2).contiguous().float()  # [N,3,H,W]
        pixels = (pixels / 255 - self.mean) / self.std
        # torchvision pads after it normalises, so that padding is zero and not black.
        rows = torch.arange(height, device=images.device) < sizes[:, :1]  # [N,H]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]  # [N,W]
        return torch.where(rows[:, None, :, None] & columns[:, None, None, :], pixels, 0.0)


class DenseHeads(nn.Module):
    """RetinaNet and FCOS from features to candidates: their forward and postprocess_detections."""

    cell_anchors: Tensor

    def __init__(self, model: RetinaNet | FCOS) -> None:
        super().__init__()
        self.head = model.head
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
        maps = list(features.values())
        outputs = self.head(maps)  # each [N, sum of all levels' h*w*A, C or 4 or 1]
        counts = [x.shape[-2] * x.shape[-1] * self.cell_anchors.shape[1] for x in maps]
        logits = outputs["cls_logits"].split(counts, 1)
        deltas = outputs["bbox_regression"].split(counts, 1)
        # RetinaNet has no centerness.
        centerness = outputs["bbox_ctrness"].split(counts, 1) if "bbox_ctrness" in outputs else None
        levels = []
        for i, x in enumerate(maps):
            scores, index, labels = self.best_pairs(logits[i], centerness[i] if centerness else None)
            anchors = anchors_at(index, self.cell_anchors[i], x.shape[-2:], canvas)
            levels.append((self.decode(take(deltas[i], index), anchors), scores, labels))
        boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        boxes = clip(boxes, sizes)  # [N,S,4]
        scores = torch.where(scores > self.score_thresh, scores, REJECTED)  # [N,S]
        classes = torch.arange(logits[0].shape[-1], device=labels.device)[:, None]  # [C,1]
        per_class = torch.where(labels[:, None] == classes, scores[:, None], REJECTED)  # [N,C,S]
        keep = nms_keep(boxes, per_class, self.nms_thresh, self.detections_per_image).any(1)
        return boxes, torch.where(keep, scores, REJECTED), labels

    def best_pairs(self, logits: Tensor, centerness: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The k best (anchor, class) pairs of one level: scores, anchor indices and labels [N,k].

        First the k best anchors by their best class, then the k best pairs among those: no pair
        can be lost, and no top-k runs over h*w*A*C values.

        Args:
            logits: [N,h*w*A,C]
            centerness: [N,h*w*A,1] logits, None for RetinaNet.
        """
        k, num_classes = self.topk_candidates, logits.shape[-1]
        best = pair_scores(logits.amax(-1, keepdim=True), centerness)[..., 0]  # [N,h*w*A]
        best, anchor = topk_padded(best, k)  # [N,k]
        scores = pair_scores(  # [N,k,C]
            take(logits, anchor), None if centerness is None else take(centerness, anchor)
        )
        # Where a level has fewer than k anchors, its last one fills up: count that one once.
        scores = torch.where(best[..., None] >= 0, scores, REJECTED)
        scores, pair = scores.flatten(1).topk(k, 1)  # [N,k]
        return scores, anchor.gather(1, pair // num_classes), pair % num_classes


class RegionHeads(nn.Module):
    """Faster R-CNN from features to candidates: torchvision's RPN and RoIHeads."""

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
        self.roi_pool = RoIPool(model)
        self.box_head = model.roi_heads.box_head
        self.box_predictor = model.roi_heads.box_predictor
        self.decode = decoder(model.roi_heads.box_coder)
        self.score_thresh = model.roi_heads.score_thresh
        self.nms_thresh = model.roi_heads.nms_thresh
        self.detections_per_image = model.roi_heads.detections_per_img

    def forward(
        self, features: dict[str, Tensor], sizes: Tensor, canvas: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [N,S,4], scores [N,S] (REJECTED where NMS drops them) and labels [N,S]."""
        proposals, found = self.propose(list(features.values()), sizes, canvas)
        n, r = found.shape
        pooled = self.roi_pool(features, proposals)  # [N*R,D,7,7]
        logits, deltas = self.box_predictor(self.box_head(pooled))  # [N*R,C], [N*R,C*4]
        boxes = self.decode(deltas.view(n, r, -1), proposals).view(n, r, -1, 4)  # [N,R,C,4]
        # Drop background, and let each class of each image be an NMS problem of its own.
        boxes = boxes[:, :, 1:].transpose(1, 2).reshape(n, -1, 4)  # [N,(C-1)*R,4]
        boxes = clip(boxes, sizes)
        scores = logits.softmax(-1).view(n, r, -1)[:, :, 1:].transpose(1, 2)  # [N,C-1,R]
        foreground = scores.shape[1]  # C-1
        large = at_least(boxes, ROI_MIN_SIZE).view(n, foreground, r)
        candidate = (scores > self.score_thresh) & large & found[:, None]
        scores = torch.where(candidate, scores, REJECTED)
        keep = nms_keep(
            boxes.view(-1, r, 4),
            scores.reshape(-1, 1, r),
            self.nms_thresh,
            self.detections_per_image,
        ).view(n, foreground, r)
        scores = torch.where(keep, scores, REJECTED).flatten(1)  # [N,(C-1)*R]
        labels = torch.arange(1, foreground + 1, device=scores.device)[:, None]
        return boxes, scores, labels.expand(n, foreground, r).flatten(1)

    def propose(self, maps: list[Tensor], sizes: Tensor, canvas: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The RPN's proposals [N,R,4] and whether there is one in that row [N,R]; zeros if not."""
        all_boxes, all_scores = [], []
        for i, (logits, deltas) in enumerate(zip(*self.rpn_head(maps), strict=True)):
            logits, deltas = per_anchor(logits, 1)[..., 0], per_anchor(deltas, 4)  # [N,h*w*A(,4)]
            # Ranked by logits, as torchvision does: large ones share the probability 1.
            logits, index = topk_padded(logits, self.pre_nms_top_n)  # [N,k]
            anchors = anchors_at(index, self.cell_anchors[i], maps[i].shape[-2:], canvas)
            boxes = clip(self.rpn_decode(take(deltas, index), anchors), sizes)  # [N,k,4]
            scores = logits.sigmoid()
            candidate = at_least(boxes, self.rpn_min_size) & (scores >= self.rpn_score_thresh)
            candidate &= ~logits.isneginf()  # the padding of a level with fewer than k anchors
            all_boxes.append(boxes)
            all_scores.append(torch.where(candidate, scores, REJECTED))
        boxes, scores = torch.stack(all_boxes, 1), torch.stack(all_scores, 1)  # [N,L,k(,4)]
        # Each level of each image is an NMS problem of its own.
        keep = nms_keep(
            boxes.flatten(0, 1),
            scores.flatten(0, 1)[:, None],
            self.rpn_nms_thresh,
            self.post_nms_top_n,
        ).view(scores.shape)
        scores = torch.where(keep, scores, REJECTED).flatten(1)  # [N,L*k]
        scores, index = topk_padded(scores, self.post_nms_top_n)  # [N,R]
        found = scores >= 0
        return torch.where(found[..., None], take(boxes.flatten(1, 2), index), 0.0), found


class RoIPool(nn.Module):
    """torchvision's MultiScaleRoIAlign for a tensor of proposals instead of a list."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        pool = model.roi_heads.box_roi_pool
        assert pool.scales is not None, "detection.families sets the scales, which torchvision leaves to the first call"
        self.scales: list[float] = pool.scales
        self.level_of = pool.map_levels  # FPN paper, equation 1
        self.featmap_names = pool.featmap_names
        self.output_size = pool.output_size
        self.sampling_ratio = pool.sampling_ratio

    def forward(self, features: dict[str, Tensor], proposals: Tensor) -> Tensor:
        """Proposals [N,R,4] in pixels of the canvas -> [N*R,D,*output_size]."""
        n, r = proposals.shape[:2]
        boxes = proposals.flatten(0, 1)  # [N*R,4]
        image = torch.arange(n, device=boxes.device)[:, None].expand(n, r).reshape(-1, 1)  # [N*R,1]
        rois = torch.cat((image.to(boxes), boxes), 1)  # [N*R,5]
        level_of_roi = self.level_of([boxes])  # [N*R]
        pooled, order = [], []
        for level, (name, scale) in enumerate(zip(self.featmap_names, self.scales, strict=True)):
            index = torch.where(level_of_roi == level)[0]
            pooled.append(roi_align(features[name], rois[index], self.output_size, scale, self.sampling_ratio))
            order.append(index)
        rows = torch.cat(order)  # the proposal of each pooled row
        row_of_roi = torch.zeros_like(level_of_roi).scatter(0, rows, torch.arange(rows.shape[0], device=rows.device))
        return torch.cat(pooled)[row_of_roi]


def decoder(coder: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """torchvision's box coder as a function: deltas [N,M,4*C] and boxes [N,M,4] -> [N,M,4*C]."""
    decode = coder.decode if isinstance(coder, BoxLinearCoder) else coder.decode_single
    return lambda deltas, boxes: decode(deltas.flatten(0, 1), boxes.flatten(0, 1)).view_as(deltas)


def pair_scores(logits: Tensor, centerness: Tensor | None) -> Tensor:
    """Probabilities of logits [...,C]; FCOS takes the geometric mean with centerness [...,1]."""
    if centerness is None:
        return logits.sigmoid()
    return torch.sqrt(logits.sigmoid() * centerness.sigmoid())


def per_anchor(x: Tensor, columns: int) -> Tensor:
    """RPN output [N,A*columns,h,w] -> [N,h*w*A,columns], in the order of the anchors."""
    n, _, h, w = x.shape
    return x.view(n, -1, columns, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, columns)


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
