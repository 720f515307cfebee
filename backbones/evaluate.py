"""The work of `python -m backbones eval`: a checkpoint's figures under its protocol, and the report of them."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.checkpoint import pick_device
from backbones.config import ClassifierConfig, ImageData
from backbones.cspnet import create_model, get_variant
from backbones.distributed import world_size
from backbones.engine import Predictions, on_main, predict
from backbones.files import check_writable, sha256, versions, write_json
from backbones.imagenet import ImageNet, list_samples
from backbones.metrics import Accuracy, Calibration, calibrate, confidence, rank, real_accuracy
from backbones.preprocess import ClassifierPreprocess
from backbones.published import RELEASES
from backbones.report import Outcomes, write_report
from backbones.weights import read_metadata, resolve

VERSIONS = ("torch", "torchvision", "pillow", "numpy")
VALIDATION = 50_000  # images of ImageNet's validation split, on which the published figures were measured


def run_eval(config: ClassifierConfig, device: torch.device | None = None) -> dict[str, Any]:
    """Evaluate, write the report with its `eval.json` to `config.output`, and return what is in that.

    Args:
        device: of this process, under torchrun; else the config's.

    Raises:
        InputError: no data, no weights, or classes that do not fit.
    """
    name, _ = get_variant(config.model)
    on_main(check_writable, config.output)
    weights = find_weights(config)
    trained_on = read_metadata(weights).get("classes") if weights and not config.ignore_head else None
    samples, classes = list_samples(config.data, config.data.split, config.num_classes, trained_on)
    device = device or pick_device(config.device)
    torch.manual_seed(config.seed)  # random weights, if none are given, are the same every time
    model = create_model(name, config.num_classes, weights, ignore_head=config.ignore_head)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    dataset = ImageNet(samples, config.preprocess, decoder=config.data.decoder, on_error=config.data.on_error)

    start = time.perf_counter()
    predictions = predict(
        model, dataset, batch_size=config.data.batch_size, workers=config.data.workers,
        amp=config.amp, channels_last=config.channels_last, title=name,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    figures, outcomes, calibration = _score(dataset, predictions, classes)
    result = figures | {
        "model": name,
        "weights": config.weights,
        "weights_sha256": sha256(weights) if weights else None,
        "protocol": describe(config.preprocess),
        "published": published(config),
        "preprocess": config.preprocess.model_dump(),
        "data": config.data.model_dump(),
        "amp": config.amp,
        "channels_last": config.channels_last,
        "device": _device_name(device),
        "processes": world_size(),
        "batch_size": predictions.batch_size,
        "seconds": round(seconds, 3),
        "images_per_second": round(figures["images"] / seconds, 2),
        "versions": versions(*VERSIONS),
    }

    def write() -> None:
        write_report(config.output, outcomes, figures["per_class"], calibration, lambda i: dataset[i][0].numpy())
        write_json(Path(config.output) / "eval.json", result)  # the last, so that a report with it is whole

    on_main(write)
    return result


def find_weights(config: ClassifierConfig) -> Path | None:
    """The config's weights as a local file; one process of torchrun downloads them for all on its machine.

    Raises:
        InputError: no such weights; or no data, which is better said before a download than after it.
    """
    if config.data.root is None or not Path(config.data.root).exists():
        list_samples(config.data, config.data.split, config.num_classes)
    source, (name, _) = config.weights, get_variant(config.model)
    if source is None:
        return None
    on_main(resolve, source, name)
    return resolve(source, name)


def _score(
    dataset: ImageNet, predictions: Predictions, classes: list[str]
) -> tuple[dict[str, Any], Outcomes, Calibration]:
    """The figures of `eval.json`, and what the report draws."""
    seen = predictions.indices
    samples = [dataset.samples[i] for i in seen]
    targets, ranked = dataset.targets.numpy()[seen], rank(predictions.logits, 5)
    accuracy = Accuracy(classes)
    accuracy.update(ranked, targets)
    figures = accuracy.compute()
    confidences = confidence(predictions.logits)
    calibration = calibrate(confidences, ranked[:, 0] == targets)
    missing = np.setdiff1d(np.arange(len(dataset)), seen)
    labelled = any(sample.real is not None for sample in samples)
    figures |= {
        "real": real_accuracy(ranked[:, 0], [sample.real or () for sample in samples]) if labelled else None,
        "ece": calibration.ece,
        "skipped": len(missing),
        "skipped_files": [dataset.samples[i].name for i in missing],
        "classes": f"{len(figures['per_class'])} of {len(classes)}",
    }
    outcomes = Outcomes([sample.name for sample in samples], seen, targets, ranked, confidences, classes)
    return figures, outcomes, calibration


def published(config: ClassifierConfig) -> list[dict[str, Any]]:
    """What others published of the same weights under the same protocol, on all of ImageNet's validation images."""
    release = RELEASES.get(get_variant(config.model)[0])
    if release is None or config.weights != "timm":
        return []
    return [
        {
            "by": figure.by,
            "top1": round(figure.top1 / 100, 6),
            "top5": round(figure.top5 / 100, 6),
            "images": VALIDATION,
        }
        for figure in release.figures
        if figure.preprocess == config.preprocess
    ]


def describe(preprocess: ClassifierPreprocess) -> str:
    """A protocol in full; without it a figure is no figure."""
    mean, std = (" ".join(f"{value:g}" for value in triple) for triple in (preprocess.mean, preprocess.std))
    return f"{preprocess}, mean {mean}, std {std}"


def headline(config: ClassifierConfig) -> str:
    """What is going to be measured, in a line."""
    data: ImageData = config.data
    return f"{config.model}, weights {config.weights}: {describe(config.preprocess)}, decoded by {data.decoder}"


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    parts = [
        f"top-1 {100 * result['top1']:.3f}  top-5 {100 * result['top5']:.3f}  "
        f"on {result['images']} images of {len(result['per_class'])} classes"
    ]
    if result.get("real") and result["real"]["top1"] is not None:
        parts.append(f"ReaL {100 * result['real']['top1']:.3f} on {result['real']['images']}")
    if result.get("skipped"):
        parts.append(f"{result['skipped']} skipped that cannot be decoded")
    parts += [
        f"published by {figure['by']} under this protocol: {100 * figure['top1']:.3f}, {100 * figure['top5']:.3f} "
        f"on {figure['images']} images"
        for figure in result.get("published", [])
    ]
    return "; ".join(parts)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
