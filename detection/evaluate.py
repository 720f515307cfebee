"""The work of `python -m detection eval`: a checkpoint's COCO figures."""

from pathlib import Path
from typing import Any

import torch

from backbones.checkpoint import pick_device
from backbones.distributed import check_alone
from backbones.errors import InputError
from backbones.files import check_writable, sha256, versions, write_json
from backbones.weights import resolve
from detection.coco import CocoSet, EvaluationImages, create_loader, read_coco
from detection.coco_eval import evaluate as coco_figures
from detection.config import DetectorConfig
from detection.engine import evaluate
from detection.models import Detector, build_detector, canonical_name, load_detector, spec_of, thresholds


def run_eval(config: DetectorConfig) -> dict[str, Any]:
    """Evaluate, write `<output>/eval.json` and `<output>/detections.json`, and return the former.

    Raises:
        InputError: no data, no weights, a data set that does not fit, or several processes.
    """
    check_alone("python -m detection eval")
    canonical_name(config.model)  # a misspelt name is said before the data is read
    check_writable(config.output)
    dataset = read_coco(config.data.images, config.data.annotations, "data.")
    print(dataset)
    model, category_ids = _model(config, dataset)
    loader = create_loader(EvaluationImages(dataset, config.preprocess), config.data.batch_size, config.data.workers)
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
        "preprocess": config.preprocess.model_dump(),
        "thresholds": thresholds(model),
        "data": config.data.model_dump(),
        "cleaned": dataset.cleaned,
        "versions": versions("torch", "torchvision", "pycocotools", "pillow", "numpy"),
    }
    write_json(output / "eval.json", result)
    return result


def _model(config: DetectorConfig, dataset: CocoSet) -> tuple[Detector, tuple[int, ...]]:
    """The trained detector and its category ids; or random weights, the same every time."""
    if config.weights is None:
        torch.manual_seed(config.seed)
        spec = spec_of(config, len(dataset.classes) + 1)
        return build_detector(spec, config.preprocess, config.weights_backbone), dataset.category_ids
    model, metadata = load_detector(config.weights, config.preprocess, **config.thresholds())
    if metadata["model"] != canonical_name(config.model):
        raise InputError(
            f"{config.weights} holds {metadata['model']}, not {config.model}: set model={metadata['model']}"
        )
    dataset.check_categories(metadata["category_ids"], metadata["classes"], config.weights)
    return model, tuple(metadata["category_ids"])


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    figures = "  ".join(f"{name} {result[name]:.4f}" for name in ("AP", "AP50", "AP75", "AR100"))
    return f"{figures}  on {result['images']} images, {result['detections']} detections"
