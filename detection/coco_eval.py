"""Detections to COCO's figures, through pycocotools: the one metric of checkpoints, artefacts, endpoints and jobs."""

import contextlib
import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbones.errors import InputError
from backbones.files import read_json
from detection.coco import load_annotations

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def to_results(
    image_id: int,
    boxes: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    categories: Sequence[int],
) -> list[dict[str, Any]]:
    """One image's detections in COCO's results format; boxes [K, 4] as x1, y1, x2, y2 in the image's pixels."""
    corners = boxes.astype(np.float64)
    xywh = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1).tolist()
    return [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        for category, box, score in zip(categories, xywh, scores.tolist(), strict=True)
    ]


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """A results file in COCO's format.

    Raises:
        InputError: missing, no JSON or another format.
    """
    results = read_json(path)
    keys = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(results, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in results):
        raise InputError(f"{path} is not in COCO's results format: a list of {', '.join(sorted(keys))}")
    return results


def evaluate(annotations: str | Path, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The 12 figures of bounding boxes (fractions; -1 where there is nothing to find), and AP and AP50 per class.

    No detections at all give 0.

    Raises:
        InputError: broken annotations, or detections of images that they do not list.
    """
    truth = _coco(load_annotations(annotations))
    foreign = {row["image_id"] for row in results} - set(truth.imgs)
    if foreign:
        raise InputError(
            f"detections of image {min(foreign)}, which {annotations} does not list: is it the right file?"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        if results:
            detections = truth.loadRes(copy.deepcopy(list(results)))
        else:  # loadRes cannot take an empty list
            detections = _coco({**truth.dataset, "annotations": []})
        evaluation = COCOeval(truth, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {name: float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    return figures | {"images": len(truth.imgs), "detections": len(results), "per_class": _per_class(evaluation)}


def _coco(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _per_class(evaluation: COCOeval) -> dict[str, dict[str, float]]:
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU thresholds, recalls, classes]; all areas
    per_class = {}
    for i, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, i]
        if (values > -1).any():
            name = str(evaluation.cocoGt.cats[category]["name"])
            per_class[name] = {"AP": float(values.mean()), "AP50": float(values[0].mean())}
    return per_class
