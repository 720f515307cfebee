"""The work of `python -m backbones eval`: a checkpoint's top-1 and top-5 under its protocol."""

from pathlib import Path
from typing import Any

import torch

from backbones.checkpoint import pick_device
from backbones.config import ClassifierConfig
from backbones.cspnet import create_model, get_variant
from backbones.engine import evaluate
from backbones.files import check_writable, sha256, versions, write_json
from backbones.imagenet import ImageNet, create_loader, list_samples
from backbones.weights import read_metadata, resolve


def run_eval(config: ClassifierConfig) -> dict[str, Any]:
    """Evaluate, write `<output>/eval.json`, and return what was written.

    Raises:
        InputError: no data, no weights, or classes that do not fit.
    """
    _, variant = get_variant(config.model)
    check_writable(config.output)
    weights = resolve(config.weights, variant.hub) if config.weights else None
    trained_on = read_metadata(weights).get("classes") if weights and not config.ignore_head else None
    samples, classes = list_samples(config.data, config.data.split, config.num_classes, trained_on)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)  # random weights, if none are given, are the same every time
    model = create_model(config.model, config.num_classes, weights, ignore_head=config.ignore_head)
    dataset = ImageNet(samples, config.preprocess)
    loader = create_loader(dataset, config.data.batch_size, config.data.workers)
    with torch.autocast(device.type, enabled=config.amp):
        metrics = evaluate(model.to(device), loader, config.preprocess, classes)
    result = metrics | {
        "model": model.name,
        "weights": str(config.weights),
        "weights_sha256": sha256(weights) if weights else None,
        "preprocess": config.preprocess.model_dump(),
        "data": config.data.model_dump(),
        "versions": versions("torch", "torchvision", "pillow", "numpy"),
    }
    write_json(Path(config.output) / "eval.json", result)
    return result


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    return (
        f"top-1 {100 * result['top1']:.3f}  top-5 {100 * result['top5']:.3f}  "
        f"on {result['images']} images of {len(result['per_class'])} classes"
    )
