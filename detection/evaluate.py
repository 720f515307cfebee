"""The work of `python -m detection eval`: a checkpoint's COCO figures."""

from pathlib import Path
from typing import Any

import torch

from backbones.checkpoint import pick_device
from backbones.errors import InputError
from backbones.evaluate import versions
from backbones.files import sha256, write_json
from backbones.weights import resolve
from detection.coco import CocoSet, EvaluationImages, create_loader, read_coco
from detection.coco_eval import evaluate as coco_figures
from detection.config import DetectorConfig
from detection.engine import evaluate
from detection.models import Detector, DetectorSpec, build_detector, load_detector


def spec_of(config: DetectorConfig, num_classes: int) -> DetectorSpec:
    """The detector that a config describes, with `num_classes` counting the background."""
    frozen = config.frozen_batchnorm
    return DetectorSpec(
        model=config.model, num_classes=num_classes, fpn_channels=config.fpn_channels,
        frozen_batchnorm=config.weights_backbone is not None if frozen is None else frozen,
        score_threshold=config.score_threshold, nms_iou=config.nms_iou, max_detections=config.max_detections,
    )  # fmt: skip


def run_eval(config: DetectorConfig) -> dict[str, Any]:
    """Evaluate, write `<output>/eval.json` and `<output>/detections.json`, and return the former.

    Raises:
        InputError: no data, no weights, or a data set that does not fit.
    """
    dataset = read_coco(config.data.images, config.data.annotations, "data.")
    print(dataset)
    model, category_ids, preprocess = _model(config, dataset)
    loader = create_loader(EvaluationImages(dataset, preprocess), config.data.batch_size, config.data.workers)
    device = pick_device(config.device)
    with torch.autocast(device.type, enabled=config.amp):
        results = evaluate(model.to(device), loader, category_ids)
    assert config.data.annotations is not None
    output = Path(config.output)
    write_json(output / "detections.json", results)
    result = coco_figures(config.data.annotations, results) | {
        "model": config.model,
        "weights": config.weights,
        "weights_sha256": sha256(resolve(config.weights)) if config.weights else None,
        "preprocess": preprocess.model_dump(),
        "data": config.data.model_dump(),
        "cleaned": dataset.cleaned,
        "versions": versions("torch", "torchvision", "pycocotools", "pillow", "numpy"),
    }
    write_json(output / "eval.json", result)
    return result


def _model(config: DetectorConfig, dataset: CocoSet) -> tuple[Detector, tuple[int, ...], Any]:
    """The trained detector, its category ids and its preprocessing; or random weights, the same every time."""
    if config.weights is None:
        torch.manual_seed(config.seed)
        spec = spec_of(config, len(dataset.classes) + 1)
        return build_detector(spec, config.preprocess, config.weights_backbone), dataset.category_ids, config.preprocess
    asked = {name: getattr(config, name) for name in ("score_threshold", "nms_iou", "max_detections")}
    model, metadata = load_detector(config.weights, **{k: v for k, v in asked.items() if v is not None})
    if metadata["detector"]["model"] != config.model:
        said = metadata["detector"]["model"]
        raise InputError(f"{config.weights} holds {said}, not {config.model}: set model={said}")
    category_ids = tuple(metadata["category_ids"])
    if not set(category_ids) & set(dataset.category_ids):
        raise InputError(f"{config.weights} and {config.data.annotations} have no category id in common")
    return model, category_ids, config.preprocess


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    figures = "  ".join(f"{name} {result[name]:.4f}" for name in ("AP", "AP50", "AP75", "AR100"))
    return f"{figures}  on {result['images']} images, {result['detections']} detections"
