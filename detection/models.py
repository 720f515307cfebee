"""A network's name -> torchvision's detector over a CSP backbone, or over its own ResNet-50; and their weights.

Names are torchvision's: `<detector>_<backbone>_<neck>`, with `_v2` for a second version. The backbone tells the neck
(`necks.py`) its channels and strides, anchors follow the levels (`families.py`). One thing differs from torchvision: a
detector takes images that `backbones.preprocess.detector_pixels` has resized, and does not resize them again, nor paste
masks, so that training, evaluation and artefacts see the same pixels.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from backbones.cspnet import CSPNet, convert_batchnorm, create_model, refuse_statistics
from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess
from backbones.weights import load_state, read_weights, resolve
from detection import published
from detection.config import Level, Norm
from detection.families import FAMILIES, Detector
from detection.necks import BackboneWithNeck, ExtraLevels, ResNet50, check_levels
from detection.published import RESNET50, TORCHVISION
from detection.spec import (
    DetectorSpec,
    FrozenStages,
    Name,
    canonical_name,
    parse,
    resolve_frozen,
    resolve_norm,
    spec_of,
)  # fmt: skip

__all__ = [
    "Detector", "DetectorSpec", "build_detector", "canonical_name", "create_detector", "has_masks", "load_detector",
    "spec_of", "start_from", "thresholds",
]  # fmt: skip


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
    fpn_channels: int = 256,
    norm: Norm | None = None,
    frozen_stages: FrozenStages | None = None,
    levels: tuple[Level, ...] | None = None,
    extra_levels: ExtraLevels | None = None,
    score_threshold: float | None = None,
    nms_iou: float | None = None,
    max_detections: int | None = None,
    preprocess: DetectorPreprocess | None = None,
) -> Detector:
    """Build a detector such as `fasterrcnn_cspresnet50_fpn`; `python -m detection models` lists them.

    A Mask R-CNN gives its `masks` as they are, [K, 1, 28, 28] in [0, 1], a grid in each box.

    Args:
        num_classes: background included, as torchvision counts.
        weights_backbone: a source of ImageNet weights that `backbones.weights` reads; its head is left out. For
            ResNet-50 a file in torchvision's layout, or `torchvision`.
        norm: the backbone's: `frozen` BatchNorm, `batch`, and in the whole detector `sync`, over all processes, or
            `group`. None is frozen over pretrained weights; else batch, or in several processes on CUDA sync.
        frozen_stages: the backbone stays as it is up to here. None is c2 over pretrained weights, as torchvision's
            three trainable layers, and none otherwise.
        levels: the backbone's maps that the neck takes; `extra_levels` above them.
        preprocess: its mean, std and divisor are the model's; None is 800 x 1333 with ImageNet's.

    Raises:
        InputError: unknown name, levels that make no pyramid, frozen random weights, or weights that do not fit.
    """
    pretrained = weights_backbone is not None
    spec = DetectorSpec(
        model=canonical_name(name), num_classes=num_classes, fpn_channels=fpn_channels,
        norm=resolve_norm(norm, pretrained, torch.cuda.is_available()),
        frozen_stages=resolve_frozen(frozen_stages, pretrained), levels=levels, extra_levels=extra_levels,
        score_threshold=score_threshold, nms_iou=nms_iou, max_detections=max_detections,
    )  # fmt: skip
    return build_detector(spec, preprocess or DetectorPreprocess(min_size=800, max_size=1333), weights_backbone)


def build_detector(
    spec: DetectorSpec, preprocess: DetectorPreprocess, weights_backbone: str | Path | None = None
) -> Detector:
    """The detector of a spec. That it may freeze random weights is not asked here: a checkpoint's will follow.

    Raises:
        InputError: unknown name, levels that make no pyramid, or weights that do not fit.
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
    if spec.norm in ("sync", "group"):  # of second versions, neck and heads too
        model = convert_batchnorm(model, spec.norm)
    model.transform = ResizedImages(preprocess)
    model.spec = spec
    return model


def _body(name: Name, levels: tuple[str, ...], spec: DetectorSpec, weights: str | Path | None) -> CSPNet | ResNet50:
    frozen = None if spec.frozen_stages == "none" else spec.frozen_stages
    check_levels(levels)
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


def load_detector(
    source: str | Path, preprocess: DetectorPreprocess | None = None, *, model: str | None = None, **overrides: Any
) -> tuple[Detector, dict[str, Any]]:
    """A trained detector and its metadata; `preprocess` and `overrides` of its spec go over what is stored there.

    Args:
        source: our safetensors; or, over ResNet-50, `torchvision` for the weights that it published, or a file in its
            layout. The metadata of what it published has its figures under `published`.
        model: the detector's name, for weights that do not say it themselves.

    Raises:
        InputError: nothing there, no detector's weights, or another detector's.
    """
    state, metadata = _read(source, model and canonical_name(model))
    name = metadata["model"]
    if model and canonical_name(model) != name:
        raise InputError(f"{source} holds {name}, not {model}: set model={name}")
    try:
        spec = DetectorSpec.model_validate(metadata["detector"] | overrides)
        preprocess = preprocess or DetectorPreprocess.model_validate(metadata["preprocess"])
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(
            f"{source} says of itself {where}: {problem['msg']}; was it written by another version?"
        ) from None
    detector = build_detector(spec, preprocess)
    load_state(detector, state, source, name)
    if metadata.pop("without_eps", False):
        published.fold_statistics(detector)
    return detector, metadata | {"detector": spec.model_dump()}


def start_from(model: Detector, source: str | Path) -> str:
    """Take over what fits of a whole detector's weights, of any source of `load_detector`, and say what did.

    A backbone is taken over as itself alone, a neck if it joins the same levels, heads within their family; tensors of
    another shape, such as those of another number of classes, are left as they are.

    Raises:
        InputError: nothing there, nothing that fits, or a frozen backbone that would stay random.
    """
    ours: DetectorSpec = model.spec
    state, metadata = _read(source, ours.model)
    theirs = DetectorSpec.model_validate(metadata["detector"])
    one, other = parse(ours.model), parse(theirs.model)
    _check_norms(ours, theirs, source)
    neck = one.neck == other.neck and ours.neck_levels == theirs.neck_levels

    def meant(key: str) -> bool:
        if key.startswith("backbone.body."):
            return one.backbone == other.backbone
        return neck if key.startswith("backbone.") else one.family == other.family

    own = model.state_dict()
    fits = {key: state[key] for key in own if key in state and meant(key) and state[key].shape == own[key].shape}
    counted = [key for key in own if not key.endswith(".num_batches_tracked")]  # frozen norms have no such count
    left = [key for key in counted if key not in fits]
    if not fits:
        raise InputError(f"nothing of {source}, a {theirs.model}, fits {ours.model}: start from a nearer relative")
    if (ours.norm == "frozen" or ours.frozen_stages != "none") and any(k.startswith("backbone.body.") for k in left):
        raise InputError(
            f"{source} lacks {left[0]}, and with norm={ours.norm}, frozen_stages={ours.frozen_stages} the backbone "
            "would stay random: give norm=batch and frozen_stages=none, or weights over the same backbone"
        )
    model.load_state_dict(fits, strict=False)
    if metadata.get("without_eps"):
        published.fold_statistics(model)
    lines = [f"started from {source}, a {theirs.model}: {len(counted) - len(left)} of {len(counted)} tensors"]
    unused = [key for key in state if key not in own and not key.endswith(".num_batches_tracked")]
    lines += _listed("left as they were", left) + _listed("not used", unused)
    return "\n".join(lines)


def _check_norms(ours: DetectorSpec, theirs: DetectorSpec, source: object) -> None:
    if (ours.norm == "group") != (theirs.norm == "group") and parse(ours.model).backbone == parse(
        theirs.model
    ).backbone:
        norm = "group" if theirs.norm == "group" else "frozen or norm=batch"
        raise InputError(
            f"{source} was trained with norm={theirs.norm}, which norm={ours.norm} is not: set norm={norm}"
        )


def _listed(what: str, keys: list[str], most: int = 6) -> list[str]:
    """A line that names the modules of some tensors, if there are any."""
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    more = f" and {len(modules) - most} more" if len(modules) > most else ""
    return [f"{what}: {', '.join(modules[:most])}{more}"] if modules else []


def _read(source: str | Path, name: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict under our names and metadata; `without_eps` in it marks frozen norms that had none.

    Args:
        name: of the detector, for torchvision's weights.
    """
    if source == TORCHVISION:
        if name is None:
            raise InputError(
                f"torchvision published several detectors: give the model, one of {', '.join(published.WEIGHTS)}"
            )
        return _from_torchvision(published.fetch(name), name, source, True)
    path = resolve(source)
    state, metadata = read_weights(path)
    if metadata.get("task") == "detection":
        return state, metadata
    if metadata or name is None or parse(name).backbone != RESNET50:
        what = metadata.get("model", "foreign weights")
        raise InputError(f"{path} holds {what}, no detector: give the .safetensors that `detection train` wrote")
    return _from_torchvision(state, name, source, published.is_published(name, path))


def _from_torchvision(
    state: dict[str, Tensor], name: str, source: str | Path, is_published: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What torchvision's layout says, in its newest spelling: its modules rename what an older version saved."""
    category_ids, classes = published.categories()
    spec = DetectorSpec(model=name, num_classes=len(classes) + 1, norm="frozen")
    preprocess = DetectorPreprocess(min_size=800, max_size=1333, divisor=32)
    with torch.device("meta"):
        reader = build_detector(spec, preprocess)
    try:
        reader.load_state_dict(state, assign=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise InputError(f"{source} does not hold torchvision's {name} for COCO: {problem}") from None
    metadata: dict[str, Any] = {
        "task": "detection", "model": name, "detector": spec.model_dump(), "classes": list(classes),
        "category_ids": list(category_ids), "preprocess": preprocess.model_dump(), "config": {},
    }  # fmt: skip
    if is_published:
        metadata |= {"published": published.figures(name), "without_eps": name in published.WITHOUT_EPS}
    return reader.state_dict(), metadata


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
