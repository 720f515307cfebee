"""A network's name -> torchvision's detector over a CSP backbone, or over its own ResNet-50.

Names are torchvision's: `<detector>_<backbone>_<neck>`, with `_v2` for a second version. The backbone tells the neck
(`necks.py`) its channels and strides, anchors follow the levels (`families.py`). One thing differs from torchvision: a
detector takes images that `backbones.preprocess.detector_pixels` has resized, and does not resize them again, nor paste
masks, so that training, evaluation and artefacts see the same pixels.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from backbones.cspnet import CSPNet, convert_batchnorm, create_model, refuse_statistics
from backbones.distributed import world_size
from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess
from backbones.weights import load_state
from detection import published
from detection.config import DetectorSettings
from detection.families import FAMILIES, Detector
from detection.names import Name
from detection.necks import BackboneWithNeck, ResNet50
from detection.published import RESNET50, TORCHVISION
from detection.spec import DetectorSpec, checked, parse, resolve


class ResizedImages(GeneralizedRCNNTransform):
    """torchvision's normalisation and batching, without its resizing and without pasting masks."""

    def __init__(self, preprocess: DetectorPreprocess):
        super().__init__(
            preprocess.min_size, preprocess.max_size, list(preprocess.mean), list(preprocess.std),
            size_divisible=preprocess.divisor,
        )  # fmt: skip

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def postprocess(
        self, result: list[dict[str, Tensor]], image_shapes: list[tuple[int, int]], original: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        return result


def create_detector(
    name: str,
    num_classes: int = 91,
    weights_backbone: str | Path | None = None,
    *,
    preprocess: DetectorPreprocess | None = None,
    **settings: Any,
) -> Detector:
    """Build a detector such as `fasterrcnn_cspresnet50_fpn`; `python -m detection models` lists them.

    A Mask R-CNN gives its `masks` as they are, [K, 1, 28, 28] in [0, 1], a grid in each box.

    Args:
        num_classes: background included, as torchvision counts.
        weights_backbone: a source of ImageNet weights that `backbones.weights` reads; its head is left out. For
            ResNet-50 a file in torchvision's layout, or `torchvision`.
        preprocess: its mean, std and divisor are the model's; None is 800 x 1333 with ImageNet's.
        settings: those of `detection.config.DetectorSettings`. Its norms `sync`, over all processes, and `group` hold
            for the whole detector, the others for the backbone.

    Raises:
        InputError: unknown name or setting, levels that make no pyramid, frozen random weights, or weights that do not
            fit.
    """
    given = checked(DetectorSettings, {"model": name, **settings}, name)
    sync = torch.cuda.is_available() and world_size() > 1
    spec = resolve(given, num_classes, weights_backbone is not None, sync)
    preprocess = preprocess or DetectorPreprocess(min_size=800, max_size=1333)
    return build_detector(spec, preprocess, weights_backbone, sync)


def build_detector(
    spec: DetectorSpec, preprocess: DetectorPreprocess, weights_backbone: str | Path | None = None, sync: bool = False
) -> Detector:
    """The detector of a spec. That it may freeze random weights is not asked here: a checkpoint's will follow.

    Args:
        sync: over a frozen backbone, the BatchNorm of neck and heads, which a second version has, takes its statistics
            over all processes.

    Raises:
        InputError: unknown name, or weights that do not fit.
    """
    name, levels = parse(spec.model), spec.neck_levels
    family = FAMILIES[name.family]
    backbone = BackboneWithNeck(
        _body(name, levels, spec, weights_backbone), levels, spec.fpn_channels,
        spec.extra_levels or family.extra_levels, name.neck, family.neck_norm if name.second else None,
        name.second and family.extra_from_body,
    )  # fmt: skip
    given = {"score": spec.score_threshold, "nms": spec.nms_iou, "detections": spec.max_detections}
    settings = {key: value for key, value in given.items() if value is not None}
    model = family.build(backbone, spec.num_classes, name.second, settings)
    norm = "sync" if sync and spec.norm == "frozen" else spec.norm
    if norm in ("sync", "group"):  # of second versions, neck and heads too
        model = convert_batchnorm(model, norm)
    model.transform = ResizedImages(preprocess)
    model.spec = spec
    return model


def _body(name: Name, levels: tuple[str, ...], spec: DetectorSpec, weights: str | Path | None) -> CSPNet | ResNet50:
    frozen = None if spec.frozen_stages == "none" else spec.frozen_stages
    if name.backbone != RESNET50:
        if weights == TORCHVISION:
            raise InputError(f"torchvision has no weights of {name.backbone}: give timm, a path or a URL")
        return create_model(
            name.backbone, num_classes=0, weights=weights, levels=levels, frozen=frozen, batchnorm=spec.norm
        )
    body = ResNet50(levels, frozen)
    if weights is not None:
        state = published.resnet50_weights(weights)
        if spec.norm == "group":
            refuse_statistics(state, weights)
        built = tuple(f"{child}." for child in body)
        load_state(body, {key: state[key] for key in state if key.startswith(built)}, weights, RESNET50)
    return convert_batchnorm(body, spec.norm)


def has_masks(detector: str | Detector) -> bool:
    """Whether a detector, or one of this name, finds masks too.

    Raises:
        InputError: unknown name.
    """
    return parse(detector).family == "maskrcnn" if isinstance(detector, str) else isinstance(detector, MaskRCNN)


def thresholds(model: Detector) -> dict[Literal["score_threshold", "nms_iou", "max_detections"], Any]:
    """What a built detector really uses, wherever its family keeps it."""
    at = model.roi_heads if isinstance(model, FasterRCNN) else model
    return {"score_threshold": at.score_thresh, "nms_iou": at.nms_thresh, "max_detections": at.detections_per_img}
