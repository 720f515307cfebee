"""The work of `python -m detection eval`: a checkpoint's COCO figures and a report of what they are made of, alone or
under torchrun; or those of a results file, for which there is no need of a model.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backbones.checkpoint import device_name, pick_device
from backbones.distributed import everywhere, is_main, on_main, rank, world_size
from backbones.errors import InputError
from backbones.files import check_writable, sha256, versions, write_aside, write_json
from backbones.preprocess import DetectorPreprocess
from backbones.weights import resolve
from detection import published
from detection.analysis import analyse
from detection.coco import CocoSet, load_annotations, read_coco
from detection.coco_eval import Metric, Row, check_results, figures, read_results
from detection.config import DetectorConfig
from detection.engine import evaluate
from detection.families import Detector
from detection.images import EvaluationImages, create_loader
from detection.models import build_detector, has_masks, thresholds
from detection.spec import canonical_name, spec_of
from detection.weights import fetch_weights, load_detector

VERSIONS = ("torch", "torchvision", "pycocotools", "pillow", "numpy")
VALIDATION = 5000  # images of COCO's val2017, on which the published figures were measured


def run_eval(config: DetectorConfig, device: torch.device | None = None) -> dict[str, Any]:
    """Evaluate; write `detections.json`, the folder `report` and `eval.json` to `config.output`; return the last.

    Args:
        device: of this process, under torchrun; else the config's.

    Raises:
        InputError: no data, no weights, or a data set that does not fit.
    """
    canonical_name(config.model)  # a misspelt name is said before the data is read
    on_main(check_writable, config.output)
    on_main(fetch_weights, config, config.weights is None)
    dataset = read_coco(config.data.images, config.data.annotations, "data.", sized=has_masks(config.model))
    if is_main():
        print(f"{len(dataset.records)} images, {len(dataset.classes)} classes", flush=True)
    model, metadata = _model(config, dataset)
    device = device or pick_device(config.device)
    share = range(rank(), len(dataset.records), world_size())
    images = EvaluationImages(dataset, config.preprocess)
    loader = create_loader(images, config.data.batch_size, config.data.workers, share)

    start = time.perf_counter()
    results = evaluate(model.to(device), loader, metadata["category_ids"], amp=config.amp, title=config.model)
    seconds = time.perf_counter() - start
    facts = {
        "model": config.model,
        "weights": config.weights,
        "weights_sha256": _sha256(config),
        "published": published_figures(config, metadata),
        "preprocess": config.preprocess.model_dump(),
        "thresholds": thresholds(model),
        "data": config.data.model_dump(),
        "metric": config.metric,
        "amp": config.amp,
        "device": device_name(device),
        "processes": world_size(),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(dataset.records) / seconds, 2),
        "versions": versions(*VERSIONS),
    }
    paths = {record.image_id: record.path for record in dataset.records}

    def finish() -> dict[str, Any] | None:
        if not is_main():
            return None
        (Path(config.output) / "eval.json").unlink(missing_ok=True)  # which is of other detections
        with write_aside(Path(config.output) / "detections.json") as aside:
            aside.write_text(json.dumps(results))  # without indentation, ten times as fast
        assert config.data.annotations is not None
        truth = load_annotations(config.data.annotations)
        check_results(results, truth, config.data.annotations)
        return _report(truth, results, config.output, facts, paths, config.metric, masks=has_masks(model))

    result = everywhere(finish)[0]
    assert result is not None
    return result


def score_results(
    detections: str, annotations: str, images: str | None, output: str, metric: Metric = "pycocotools"
) -> dict[str, Any]:
    """Score a results file in COCO's format; write the folder `report` and `eval.json` to `output`, return the latter.

    Args:
        images: the folder of the images, if the worst of them are to be drawn.

    Raises:
        InputError: broken annotations or results, of which it names the row; or an image that is not there.
    """
    check_writable(output)
    truth, results = load_annotations(annotations), read_results(detections)
    check_results(results, truth, annotations, categories=True)
    paths = {} if images is None else {image["id"]: Path(images) / image["file_name"] for image in truth["images"]}
    for path in paths.values():
        if not path.is_file():
            raise InputError(f"{annotations} lists {path.name}, which is not in {images}")
    facts = {
        "detections_sha256": sha256(detections),
        "annotations_sha256": sha256(annotations),
        "metric": metric,
        "versions": versions("pycocotools", "numpy"),
    }
    return _report(truth, results, output, facts, paths, metric, masks=None)


def _report(
    truth: dict[str, Any],
    results: Sequence[Row],
    output: str,
    facts: Mapping[str, Any],
    paths: Mapping[int, Path],
    metric: Metric,
    *,
    masks: bool | None,
) -> dict[str, Any]:
    """Write the report and, last, `eval.json`, so that a report with it is whole."""
    from detection.report import write_report  # and matplotlib, which training and the other processes do without

    found = analyse(truth, results)
    scored = figures(truth, results, metric, masks)
    result = scored | {"best_threshold": found.threshold, "best_f1": found.f1, "errors": found.kinds["kinds"], **facts}
    path = Path(output) / "eval.json"
    path.unlink(missing_ok=True)
    write_report(Path(output) / "report", result, found, paths)
    write_json(path, result)
    return result


def _sha256(config: DetectorConfig) -> str | None:
    if config.weights is None or config.weights == published.TORCHVISION:  # whose hash torchvision checks
        return None
    return sha256(resolve(config.weights))


def _model(config: DetectorConfig, dataset: CocoSet) -> tuple[Detector, dict[str, Any]]:
    """The trained detector and its metadata; or random weights, the same every time."""
    if config.weights is None:
        torch.manual_seed(config.seed)
        spec = spec_of(config, len(dataset.classes) + 1)
        model = build_detector(spec, config.preprocess, config.weights_backbone)
        return model, {"category_ids": dataset.category_ids}
    settings: dict[str, Any] = config.thresholds()
    model, metadata = load_detector(config.weights, config.preprocess, model=config.model, **settings)
    dataset.check_categories(metadata["category_ids"], metadata["classes"], config.weights)
    return model, metadata


def published_figures(config: DetectorConfig, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """What torchvision published of the same weights, as fractions, on all of COCO val2017; `same_settings` says
    whether the config has its sizes and thresholds. Pixels differ all the same: torchvision resizes tensors, without
    antialiasing where they shrink and with sides rounded down, and here Pillow resizes pictures.
    """
    if "published" not in metadata:
        return None
    theirs = DetectorPreprocess.model_validate(metadata["preprocess"])
    same = config.preprocess == theirs and not config.thresholds()
    given = {"AP": "box_map", "mask_AP": "mask_map"}
    published_as = {
        name: round(metadata["published"][key] / 100, 6) for name, key in given.items() if key in metadata["published"]
    }
    return published_as | {"by": "torchvision", "images": VALIDATION, "same_settings": same}
