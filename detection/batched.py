"""torchvision's FPN detectors as one tensor function over a padded batch.

torchvision's own forward takes a list of images and returns a list of dicts, and the sizes of what it returns depend on
the data, so `torch.onnx.export(dynamo=True)` cannot trace it. Here the same detections come with static sizes: what
falls out keeps its row and gets the score REJECTED. Eager PyTorch runs it, and ONNX export traces it. Every setting is
read from the model.

Shapes, here and in the comments below:
    N images, H x W canvas (the padded size), C classes (background included), R proposals per image
    K detections returned per image

Sources: torchvision 0.29, `models/detection/generalized_rcnn.py` and `transform.py`.
Deviation: NMS treats each class (in the RPN each level) by itself. torchvision's `batched_nms` does so on the CPU above
1000 boxes; below, it moves the classes apart in float32, whose rounding can carry an IoU across the threshold.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet

from backbones.errors import InputError
from detection.boxes import take
from detection.dense_heads import DenseHeads
from detection.onnx_ops import topk_padded
from detection.region_heads import MaskHead, RegionHeads


def output_names(model: nn.Module, nms: bool = True) -> list[str]:
    """What `BatchedDetector(model, nms)` returns, by name."""
    if not nms:
        return ["boxes", "scores"]
    return ["boxes", "scores", "labels", "num_detections"] + (["masks"] if isinstance(model, MaskRCNN) else [])


class BatchedDetector(nn.Module):
    """A frozen copy of a RetinaNet, FCOS, Faster or Mask R-CNN: padded batch in, padded detections out.

    The given model is copied, not shared, and may go on training. The copy is in eval mode and its parameters need no
    gradients.

    Args:
        nms: False for the raw heads, from which detections are still to be chosen.

    Raises:
        InputError: for any other detector, among them Keypoint R-CNN.
    """

    def __init__(self, model: nn.Module, nms: bool = True) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval().requires_grad_(False)
        self.nms = nms
        self.heads: DenseHeads | RegionHeads
        self.mask_head: MaskHead | None = None
        if isinstance(model, RetinaNet | FCOS):
            self.heads = DenseHeads(model)
        elif isinstance(model, FasterRCNN) and not isinstance(model, KeypointRCNN):
            self.heads = RegionHeads(model)
            if isinstance(model, MaskRCNN) and nms:
                self.mask_head = MaskHead(model)
        else:
            raise InputError(
                f"cannot batch or export a {type(model).__name__}: supported are RetinaNet, FCOS, FasterRCNN and "
                "MaskRCNN"
            )
        self.normalize = Normalize(model.transform.image_mean, model.transform.image_std)
        self.backbone = model.backbone
        self.eval().to(next(self.parameters()).device)  # the buffers too

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect objects, best first; rows from num_detections on are zeros.

        Raw heads are decoded and clipped, in no order; their detections are those of an NMS in each class over what is
        above the score threshold, and of all classes the best K. torchvision's one-stage detectors take only the best
        `topk_candidates` pairs of each level into it, its two-stage ones no box with a side below ROI_MIN_SIZE.

        Args:
            images: [N,H,W,3] uint8 RGB, each image in the upper left corner of its canvas, resized.
            sizes: [N,2] int64, the (height, width) in pixels that the image fills of its canvas.

        Returns:
            boxes [N,K,4] float32 as (x1,y1,x2,y2) in pixels of the canvas, scores [N,K] float32, labels [N,K] int64
            (torchvision's: 0 is background), num_detections [N] int64; of a Mask R-CNN also masks [N,K,28,28] float32,
            the probabilities of a detection's own class on a grid in its box.
            Raw, of a one-stage detector: boxes [N,M,4] of all M anchors, level by level, and scores [N,M,C]; of a
            two-stage one: boxes [N,R,C-1,4] and scores [N,R,C-1], column c of label c + 1, zeros past the proposals.
        """
        features = self.backbone(self.normalize(images, sizes))  # {name: [N,D,h,w]}
        canvas = images.shape[1:3]
        if not self.nms:
            return self.heads.raw(features, sizes, canvas)
        boxes, scores, labels = self.heads(features, sizes, canvas)
        scores, index = topk_padded(scores, self.heads.detections_per_image)  # [N,K]
        found = scores >= 0
        boxes = torch.where(found[..., None], take(boxes, index), 0.0)  # [N,K,4]
        labels = torch.where(found, labels.gather(1, index), 0)  # [N,K]
        detections = (boxes, torch.where(found, scores, 0.0), labels, found.sum(1))
        if self.mask_head is None:
            return detections
        return *detections, self.mask_head(features, boxes, labels, found)


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
