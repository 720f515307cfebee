"""The families of detectors: torchvision's classes with its own settings, over a backbone with a neck.

Anchors and the pooling of regions follow the strides of the levels: with torchvision's levels they are torchvision's.
Its second versions (`_v2`) have BatchNorm in neck and heads and deeper heads of the two-stage detectors, GroupNorm in
the head of RetinaNet and a GIoU loss. Convolutions of the heads are as wide as the neck, 256 channels in torchvision.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from detection.config import ExtraLevels
from detection.necks import BackboneWithNeck, NormLayer

Detector: TypeAlias = FasterRCNN | RetinaNet | FCOS
Settings: TypeAlias = Mapping[str, Any]  # score, nms and detections, where they are not torchvision's

RATIOS = (0.5, 1.0, 2.0)
ROI_FEATURES = 1024  # of the box head's last layer


@dataclass(frozen=True)
class Family:
    """A detector as torchvision builds it.

    Attributes:
        build: a backbone with its neck, num_classes with the background, whether it is the second version, settings.
        levels: the backbone's maps it takes; `extra_levels` above them.
        versions: 1, or 1 and 2.
        neck_norm: of the second version's neck.
        extra_from_body: the second version's extra levels start from the backbone.
    """

    build: Callable[[BackboneWithNeck, int, bool, Settings], Detector]
    levels: tuple[str, ...]
    extra_levels: ExtraLevels
    versions: tuple[int, ...] = (1, 2)
    neck_norm: NormLayer | None = None
    extra_from_body: bool = False


def _anchors(backbone: BackboneWithNeck, scale: float, octaves: int, ratios: tuple[float, ...]) -> AnchorGenerator:
    """Of each level, sizes from `scale` strides on and `octaves` parts of an octave apart; whole pixels."""
    sizes = tuple(tuple(int(scale * s * 2 ** (i / octaves)) for i in range(octaves)) for s in backbone.strides)
    return AnchorGenerator(sizes, (ratios,) * len(sizes))


def _two_stage(backbone: BackboneWithNeck, num_classes: int, second: bool, settings: Settings) -> FasterRCNN:
    return FasterRCNN(backbone, **_box_parts(backbone, num_classes, second, settings))


def _mask_rcnn(backbone: BackboneWithNeck, num_classes: int, second: bool, settings: Settings) -> MaskRCNN:
    width = backbone.out_channels
    return MaskRCNN(
        backbone,
        mask_roi_pool=_roi_pool(backbone, 14),
        mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=nn.BatchNorm2d if second else None),
        mask_predictor=MaskRCNNPredictor(width, width, num_classes),
        **_box_parts(backbone, num_classes, second, settings),
    )


def _box_parts(backbone: BackboneWithNeck, num_classes: int, second: bool, settings: Settings) -> dict[str, Any]:
    width = backbone.out_channels
    anchors = _anchors(backbone, 8, 1, RATIOS)  # 32 ... 512 pixels
    head: nn.Module = TwoMLPHead(width * 7 * 7, ROI_FEATURES)
    if second:
        head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [ROI_FEATURES], norm_layer=nn.BatchNorm2d)
    names = {"score": "box_score_thresh", "nms": "box_nms_thresh", "detections": "box_detections_per_img"}
    return {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(width, anchors.num_anchors_per_location()[0], conv_depth=2 if second else 1),
        "box_roi_pool": _roi_pool(backbone, 7),
        "box_head": head,
        "box_predictor": FastRCNNPredictor(ROI_FEATURES, num_classes),
    } | {names[key]: value for key, value in settings.items()}


def _roi_pool(backbone: BackboneWithNeck, size: int) -> MultiScaleRoIAlign:
    pool = MultiScaleRoIAlign(list(backbone.levels), output_size=size, sampling_ratio=2)
    # Left to itself it guesses the strides from the first images, and wrongly if those do not fill their canvas.
    strides = backbone.strides[: len(backbone.levels)]
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool


_ONE_STAGE = {"score": "score_thresh", "nms": "nms_thresh", "detections": "detections_per_img"}


def _retinanet(backbone: BackboneWithNeck, num_classes: int, second: bool, settings: Settings) -> RetinaNet:
    anchors = _anchors(backbone, 4, 3, RATIOS)  # 32 ... 512 and two thirds of an octave above each
    head = RetinaNetHead(
        backbone.out_channels, anchors.num_anchors_per_location()[0], num_classes,
        norm_layer=partial(nn.GroupNorm, 32) if second else None,
    )  # fmt: skip
    if second:
        head.regression_head._loss_type = "giou"
    given = {_ONE_STAGE[key]: value for key, value in settings.items()}
    return RetinaNet(backbone, num_classes, anchor_generator=anchors, head=head, **given)


def _fcos(backbone: BackboneWithNeck, num_classes: int, second: bool, settings: Settings) -> FCOS:
    given = {_ONE_STAGE[key]: value for key, value in settings.items()}
    return FCOS(backbone, num_classes, anchor_generator=_anchors(backbone, 1, 1, (1.0,)), **given)


_ALL, _UPPER = ("c2", "c3", "c4", "c5"), ("c3", "c4", "c5")
FAMILIES: dict[str, Family] = {
    "fasterrcnn": Family(_two_stage, _ALL, "pool", neck_norm=nn.BatchNorm2d),
    "retinanet": Family(_retinanet, _UPPER, "p6p7", extra_from_body=True),
    "fcos": Family(_fcos, _UPPER, "p6p7", versions=(1,)),
    "maskrcnn": Family(_mask_rcnn, _ALL, "pool", neck_norm=nn.BatchNorm2d),
}
