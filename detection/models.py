"""CSP backbone + FPN -> torchvision's Faster R-CNN, RetinaNet or FCOS; and their weights.

The detectors are torchvision's own classes with its defaults; the backbone tells the FPN its channels and
strides, and the anchors follow the strides. One thing differs: a detector takes images that
`backbones.preprocess.detector_pixels` has resized, and does not resize them again, so that training,
evaluation and artefacts see the same pixels.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from backbones.cspnet import CSPNet, create_model, get_variant
from backbones.errors import InputError, unknown
from backbones.preprocess import DetectorPreprocess
from backbones.published import ALIASES, PLAIN
from backbones.schema import Section
from backbones.variants import VARIANTS
from backbones.weights import load_state, read_weights, resolve
from detection.config import DetectorConfig

Detector: TypeAlias = FasterRCNN | RetinaNet | FCOS
FAMILIES = ("fasterrcnn", "retinanet", "fcos")


class DetectorSpec(Section):
    """All that it takes to build a detector; kept in its weights' metadata. None means torchvision's default."""

    model: str
    num_classes: int = Field(ge=2)  # background included, as torchvision counts
    fpn_channels: int = Field(default=256, ge=64, multiple_of=32)  # the heads' GroupNorm has 32 groups
    frozen_batchnorm: bool = False
    score_threshold: float | None = Field(default=None, ge=0, lt=1)
    nms_iou: float | None = Field(default=None, gt=0, le=1)
    max_detections: int | None = Field(default=None, ge=1)


class ResizedImages(GeneralizedRCNNTransform):
    """torchvision's normalisation and batching, without its resizing."""

    def __init__(self, preprocess: DetectorPreprocess):
        super().__init__(
            preprocess.min_size, preprocess.max_size, list(preprocess.mean), list(preprocess.std),
            size_divisible=preprocess.divisor,
        )  # fmt: skip

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class BackboneWithFPN(nn.Module):
    """Images [N, 3, H, W] -> `{"c3": [N, out_channels, H/8, W/8], ...}`, with the extra levels last.

    Attributes:
        strides: pixels a cell of each level, in order.
    """

    def __init__(self, body: CSPNet, levels: Sequence[str], out_channels: int, extra: ExtraFPNBlock):
        super().__init__()
        self.body, self.levels, self.out_channels = body, tuple(levels), out_channels
        self.fpn = FeaturePyramidNetwork([body.channels[level] for level in levels], out_channels, extra)
        extra_levels = 2 if isinstance(extra, LastLevelP6P7) else 1
        strides = [body.strides[level] for level in levels]
        self.strides = strides + [strides[-1] * 2 ** (i + 1) for i in range(extra_levels)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body.forward_features(x)
        pyramid: dict[str, Tensor] = self.fpn({level: features[level] for level in self.levels})
        return pyramid


def create_detector(
    name: str,
    num_classes: int = 91,
    weights_backbone: str | Path | None = None,
    *,
    fpn_channels: int = 256,
    frozen_batchnorm: bool | None = None,
    score_threshold: float | None = None,
    nms_iou: float | None = None,
    max_detections: int | None = None,
    preprocess: DetectorPreprocess | None = None,
) -> Detector:
    """Build `<family>_<backbone>_fpn`, such as `fasterrcnn_cspresnet50_fpn`.

    Args:
        num_classes: background included, as torchvision counts.
        weights_backbone: a source of ImageNet weights that `backbones.weights` reads; its head is left out.
        frozen_batchnorm: freeze the backbone's BatchNorm; None freezes it over pretrained weights alone, since
            over random ones it would freeze noise.
        preprocess: its mean, std and divisor are the model's; None is 800 x 1333 with ImageNet's.

    Raises:
        InputError: unknown name, or weights that do not fit.
    """
    family, backbone = _parse(name)
    frozen = frozen_batchnorm if frozen_batchnorm is not None else weights_backbone is not None
    body = create_model(backbone, num_classes=0, weights=weights_backbone, batchnorm="frozen" if frozen else "batch")
    build = {"fasterrcnn": _faster_rcnn, "retinanet": _retinanet, "fcos": _fcos}[family]
    given = {"score": score_threshold, "nms": nms_iou, "detections": max_detections}
    model = build(body, num_classes, fpn_channels, {key: value for key, value in given.items() if value is not None})
    model.transform = ResizedImages(preprocess or DetectorPreprocess(min_size=800, max_size=1333))
    return model


def canonical_name(name: str) -> str:
    """A detector's name with its backbone's alias resolved.

    Raises:
        InputError: unknown name.
    """
    family, backbone = _parse(name)
    return f"{family}_{get_variant(backbone)[0]}_fpn"


def _parse(name: str) -> tuple[str, str]:
    match = re.fullmatch(r"([a-z]+)_(.+)_fpn", name)
    if match is None or match[1] not in FAMILIES or match[2].removesuffix(PLAIN) not in {**VARIANTS, **ALIASES}:
        raise unknown("detector", name, [f"{family}_{body}_fpn" for family in FAMILIES for body in VARIANTS])
    return match[1], match[2]


def _faster_rcnn(body: CSPNet, num_classes: int, channels: int, given: dict[str, Any]) -> FasterRCNN:
    backbone = BackboneWithFPN(body, ("c2", "c3", "c4", "c5"), channels, LastLevelMaxPool())
    sizes = tuple((8 * stride,) for stride in backbone.strides)  # 32 ... 512
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    pool = MultiScaleRoIAlign(list(backbone.levels), output_size=7, sampling_ratio=2)
    # Left to itself it guesses the strides from the first images, and wrongly if those do not fill their canvas.
    strides = backbone.strides[: len(backbone.levels)]
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    names = {"score": "box_score_thresh", "nms": "box_nms_thresh", "detections": "box_detections_per_img"}
    settings = {names[key]: value for key, value in given.items()}
    return FasterRCNN(backbone, num_classes, rpn_anchor_generator=anchors, box_roi_pool=pool, **settings)


_ONE_STAGE = {"score": "score_thresh", "nms": "nms_thresh", "detections": "detections_per_img"}


def _retinanet(body: CSPNet, num_classes: int, channels: int, given: dict[str, Any]) -> RetinaNet:
    backbone = BackboneWithFPN(body, ("c3", "c4", "c5"), channels, LastLevelP6P7(channels, channels))
    # 32 ... 512 and two thirds of an octave above each; whole pixels, as in torchvision
    sizes = tuple(tuple(int(4 * stride * 2 ** (third / 3)) for third in range(3)) for stride in backbone.strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    settings = {_ONE_STAGE[key]: value for key, value in given.items()}
    return RetinaNet(backbone, num_classes, anchor_generator=anchors, **settings)


def _fcos(body: CSPNet, num_classes: int, channels: int, given: dict[str, Any]) -> FCOS:
    backbone = BackboneWithFPN(body, ("c3", "c4", "c5"), channels, LastLevelP6P7(channels, channels))
    anchors = AnchorGenerator(tuple((stride,) for stride in backbone.strides), ((1.0,),) * len(backbone.strides))
    settings = {_ONE_STAGE[key]: value for key, value in given.items()}
    return FCOS(backbone, num_classes, anchor_generator=anchors, **settings)


def spec_of(config: DetectorConfig, num_classes: int) -> DetectorSpec:
    """The detector that a config describes, with `num_classes` counting the background."""
    frozen = config.frozen_batchnorm
    return DetectorSpec(
        model=canonical_name(config.model), num_classes=num_classes, fpn_channels=config.fpn_channels,
        frozen_batchnorm=config.weights_backbone is not None if frozen is None else frozen,
        score_threshold=config.score_threshold, nms_iou=config.nms_iou, max_detections=config.max_detections,
    )  # fmt: skip


def build_detector(
    spec: DetectorSpec, preprocess: DetectorPreprocess, weights_backbone: str | Path | None = None
) -> Detector:
    """The detector of a spec."""
    return create_detector(
        spec.model, spec.num_classes, weights_backbone, fpn_channels=spec.fpn_channels,
        frozen_batchnorm=spec.frozen_batchnorm, score_threshold=spec.score_threshold, nms_iou=spec.nms_iou,
        max_detections=spec.max_detections, preprocess=preprocess,
    )  # fmt: skip


def load_detector(
    path: str | Path, preprocess: DetectorPreprocess | None = None, **overrides: Any
) -> tuple[Detector, dict[str, Any]]:
    """A trained detector and its metadata from our safetensors; `preprocess` and `overrides` of its spec go over
    what is stored there.

    Raises:
        InputError: no file, or not a detector's weights.
    """
    state, metadata = read_weights(resolve(path))
    if metadata.get("task") != "detection":
        what = metadata.get("model", "foreign weights")
        raise InputError(f"{path} holds {what}, no detector: give the .safetensors that `detection train` wrote")
    spec = DetectorSpec.model_validate(metadata["detector"] | overrides)
    model = build_detector(spec, preprocess or DetectorPreprocess.model_validate(metadata["preprocess"]))
    load_state(model, state, path, spec.model)
    return model, metadata | {"detector": spec.model_dump()}


def thresholds(model: Detector) -> dict[Literal["score_threshold", "nms_iou", "max_detections"], Any]:
    """What a built detector really uses, wherever its family keeps it."""
    if isinstance(model, FasterRCNN):
        heads = model.roi_heads
        score, iou, most = heads.score_thresh, heads.nms_thresh, heads.detections_per_img
    else:
        score, iou, most = model.score_thresh, model.nms_thresh, model.detections_per_img
    return {"score_threshold": score, "nms_iou": iou, "max_detections": most}
