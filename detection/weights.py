"""A whole detector's weights: to load, to start a training from, and torchvision's published ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess
from backbones.weights import load_state, read_weights, resolve
from detection import published
from detection.config import DetectorConfig
from detection.families import Detector
from detection.models import build_detector
from detection.published import RESNET50, TORCHVISION
from detection.spec import DetectorSpec, canonical_name, checked, parse

# The layers whose rows are classes.
OF_CLASSES = ("classification_head.cls_logits.", "box_predictor.", "mask_fcn_logits.")


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
    spec = _spec(metadata, source, **overrides)
    preprocess = preprocess or checked(DetectorPreprocess, metadata["preprocess"], _whose(source))
    detector = build_detector(spec, preprocess)
    load_state(detector, state, source, name)
    if metadata.pop("without_eps", False):
        published.fold_statistics(detector)
    return detector, metadata | {"detector": spec.model_dump()}


def start_from(
    model: Detector,
    source: str | Path,
    category_ids: Sequence[int],
    classes: Sequence[str],
    *,
    body_loaded: bool = False,
) -> str:
    """Take over what fits of a whole detector's weights, of any source of `load_detector`, and say what did.

    A backbone is taken over as itself alone, a neck if it joins the same levels, heads within their family, and their
    last layers for the same categories; tensors of another shape are left as they are.

    Args:
        category_ids: that the model is to find, in the order of its labels; `classes` their names.
        body_loaded: the backbone has weights of its own already.

    Raises:
        InputError: nothing there, nothing that fits, or a frozen backbone that would stay random.
    """
    ours: DetectorSpec = model.spec
    state, metadata = _read(source, ours.model)
    theirs = _spec(metadata, source)
    one, other = parse(ours.model), parse(theirs.model)
    _check_norms(ours, theirs, source)
    neck = one.neck == other.neck and ours.neck_levels == theirs.neck_levels
    categories = metadata.get("category_ids"), metadata.get("classes")
    foreign = OF_CLASSES if categories != ([*category_ids], [*classes]) else ()

    def meant(key: str) -> bool:
        if key.startswith("backbone.body."):
            return one.backbone == other.backbone
        if key.startswith("backbone."):
            return neck
        return one.family == other.family and not any(part in key for part in foreign)

    own = model.state_dict()
    fits = {key: state[key] for key in own if key in state and meant(key) and state[key].shape == own[key].shape}
    counted = [key for key in own if not key.endswith(".num_batches_tracked")]  # frozen norms have no such count
    left = [key for key in counted if key not in fits]
    if not fits:
        raise InputError(f"nothing of {source}, a {theirs.model}, fits {ours.model}: start from a nearer relative")
    random = () if body_loaded else [key for key in left if key.startswith("backbone.body.")]
    if random and (ours.norm == "frozen" or ours.frozen_stages != "none"):
        raise InputError(
            f"{source} lacks {random[0]}, and with norm={ours.norm}, frozen_stages={ours.frozen_stages} the backbone "
            "would stay random: give norm=batch and frozen_stages=none, or weights over the same backbone"
        )
    model.load_state_dict(fits, strict=False)
    if metadata.get("without_eps"):
        published.fold_statistics(model)
    lines = [f"started from {source}, a {theirs.model}: {len(counted) - len(left)} of {len(counted)} tensors"]
    unused = [key for key in state if key not in own and not key.endswith(".num_batches_tracked")]
    of_classes = [key for key in left if one.family == other.family and any(part in key for part in foreign)]
    lines += _listed("left as they were, being of other classes", of_classes)
    lines += _listed("left as they were", [key for key in left if key not in of_classes])
    lines += _listed("not used", unused)
    return "\n".join(lines)


def _spec(metadata: dict[str, Any], source: object, **overrides: Any) -> DetectorSpec:
    return checked(DetectorSpec, metadata["detector"] | overrides, _whose(source))


def _whose(source: object) -> str:
    return f"{source}, perhaps written by another version"


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


def fetch_weights(config: DetectorConfig, backbone: bool) -> None:
    """Download the weights that the config names, if need be: in one process, before several look for them.

    Args:
        backbone: the backbone's own, too.

    Raises:
        InputError: there are none, or no way to them.
    """
    name = parse(config.model)
    if config.weights == TORCHVISION:
        published.fetch(str(name))
    elif config.weights is not None:
        resolve(config.weights)
    if config.weights_backbone is None or not backbone:
        return
    if name.backbone == RESNET50:
        published.resnet50_weights(config.weights_backbone)
    else:
        resolve(config.weights_backbone, name.backbone)
