"""The work of `python -m backbones eval`: a checkpoint's figures under its protocol, and the report of them."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.checkpoint import device_name, pick_device
from backbones.config import ClassifierConfig
from backbones.cspnet import CSPNet, create_model, get_variant
from backbones.distributed import on_main, together, world_size
from backbones.engine import Predictions, predict
from backbones.files import check_writable, sha256, versions, write_json
from backbones.imagenet import ImageNet
from backbones.metrics import Accuracy, Calibration, Outcomes, calibrate, confidence, rank, real_accuracy
from backbones.published import RELEASES
from backbones.samples import list_samples
from backbones.summary import describe
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
    dataset, classes, model = together(lambda: _load(config, name, weights))
    device = device or pick_device(config.device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]

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
        "ignore_head": config.ignore_head,
        "seed": random_seed(config),
        "protocol": describe(config.preprocess),
        "published": published(config),
        "preprocess": config.preprocess.model_dump(),
        "data": config.data.model_dump(),
        "amp": config.amp,
        "channels_last": config.channels_last,
        "device": device_name(device),
        "processes": world_size(),
        "batch_size": predictions.batch_size,
        "seconds": round(seconds, 3),
        "images_per_second": round(figures["images"] / seconds, 2),
        "versions": versions(*VERSIONS),
    }

    def write() -> None:
        from backbones.report import write_report  # and matplotlib, which training and the other processes do without

        path = Path(config.output) / "eval.json"
        path.unlink(missing_ok=True)  # it comes last, so that a report with it is whole
        write_report(config.output, outcomes, figures["per_class"], calibration, lambda i: dataset[i][0].numpy())
        write_json(path, result)

    on_main(write)
    return result


def find_weights(config: ClassifierConfig) -> Path | None:
    """The config's weights as a local file; one process of torchrun downloads them for all on its machine.

    Raises:
        InputError: no such weights; or no data, which is better said before a download than after it. Of whatever
            process; all raise it.
    """
    source, (name, _) = config.weights, get_variant(config.model)
    together(lambda: _check_root(config))
    if source is None:
        return None
    on_main(resolve, source, name)
    return together(lambda: resolve(source, name))


def _check_root(config: ClassifierConfig) -> None:
    if config.data.root is None or not Path(config.data.root).exists():
        list_samples(config.data, config.data.split, config.num_classes)


def _load(config: ClassifierConfig, name: str, weights: Path | None) -> tuple[ImageNet, list[str], CSPNet]:
    """The images, the names of the classes and the network."""
    data = config.data
    trained_on = read_metadata(weights).get("classes") if weights and not config.ignore_head else None
    samples, classes = list_samples(data, data.split, config.num_classes, trained_on)
    torch.manual_seed(config.seed)  # random weights, if none are given, are the same every time
    model = create_model(name, config.num_classes, weights, ignore_head=config.ignore_head)
    return ImageNet(samples, config.preprocess, decoder=data.decoder, on_error=data.on_error), classes, model


def random_seed(config: ClassifierConfig) -> int | None:
    """The seed that random weights come from, if any of the network's are random."""
    return config.seed if config.weights is None or config.ignore_head else None


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
    if release is None or config.weights != "timm" or config.ignore_head:
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
