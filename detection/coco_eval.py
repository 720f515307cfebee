"""Detections to COCO's figures, through pycocotools: the one metric of checkpoints, artefacts, endpoints and jobs.

`metric="fast"` takes faster-coco-eval in its place, the same algorithm in C++.
"""

import contextlib
import io
import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbones.errors import InputError
from backbones.files import read_json
from detection.coco import check_sizes, load_annotations
from detection.findings import is_number
from detection.masks import are_whole, is_polygon, is_usable, stated_size

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
Metric = Literal["pycocotools", "fast"]
Row = dict[str, Any]


def to_results(
    image_id: int,
    boxes: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    categories: Sequence[int],
    segmentations: Sequence[Mapping[str, Any]] | None = None,
) -> list[Row]:
    """One image's detections in COCO's results format; boxes [K, 4] as x1, y1, x2, y2 in the image's pixels, and
    their masks as compressed RLE, if there are any.
    """
    corners = boxes.astype(np.float64)
    xywh = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1).tolist()
    rows: list[Row] = [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        for category, box, score in zip(categories, xywh, scores.tolist(), strict=True)
    ]
    for row, segmentation in zip(rows, segmentations or (), strict=segmentations is not None):
        row["segmentation"] = segmentation
    return rows


def read_results(path: str | Path) -> list[Row]:
    """A results file in COCO's format; where it has masks alone, the boxes are theirs.

    Raises:
        InputError: missing, no JSON or another format.
    """
    results = read_json(path)
    keys = {"image_id", "category_id", "score"}
    if not isinstance(results, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in results):
        raise InputError(f"{path} is not in COCO's results format: a list of bbox, {', '.join(sorted(keys))}")
    for i, row in enumerate(results):
        if "bbox" not in row:
            problem = _mask_problem(row.get("segmentation"), {})
            if problem:
                raise InputError(f"{path} is not in COCO's results format: row {i} has no bbox, and {problem}")
            row["bbox"] = rle.toBbox(row["segmentation"]).tolist()
    return results


def evaluate(
    annotations: str | Path, results: Sequence[Row], metric: Metric = "pycocotools", masks: bool | None = None
) -> dict[str, Any]:
    """The 12 figures of bounding boxes (fractions; -1 where there is nothing to find), and AP and AP50 per class.

    No detections at all give 0. Detections of categories that the annotations do not have are left out, as COCO does,
    and counted as `foreign`. Masks have the same figures under `segm`; an object without a mask has its box for one
    (`boxes_as_masks` counts them).

    Args:
        masks: whether the detections have masks, which are then evaluated if the truth has any; None: as they have.

    Raises:
        InputError: broken annotations or detections, or `fast` is not installed.
    """
    truth = load_annotations(annotations)
    check_results(results, truth, annotations)
    return figures(truth, results, metric, masks)


def figures(truth: dict[str, Any], results: Sequence[Row], metric: Metric, masks: bool | None) -> dict[str, Any]:
    """As `evaluate`, of annotations that `load_annotations` gave and detections that `check_results` has passed; the
    annotations' masks are changed to what pycocotools can read.

    Raises:
        InputError: images without the sizes that masks need, or `fast` is not installed.
    """
    result = _figures(truth, _box_rows(results), "bbox", metric)
    categories = {category["id"] for category in truth["categories"]}
    result["foreign"] = sum(row["category_id"] not in categories for row in results)
    masks = any("segmentation" in row for row in results) if masks is None else masks
    if masks and any(annotation.get("segmentation") for annotation in truth["annotations"]):
        check_sizes(truth)
        boxes = _fill_masks(truth)
        result["segm"] = _figures(truth, _mask_rows(results), "segm", metric) | {"boxes_as_masks": boxes}
    return result


def check_results(
    results: Sequence[Row], truth: Mapping[str, Any], annotations: object, categories: bool = False
) -> None:
    """That detections are whole and of the images that the annotations list; with `categories`, of their categories.

    Raises:
        InputError: it names the first row that is not.
    """
    images = {image["id"]: image for image in truth["images"]}
    known = {category["id"] for category in truth["categories"]} if categories else None
    if _all_fine(results, images, known):
        return
    has_masks = any("segmentation" in row for row in results)
    for i, row in enumerate(results):
        problem = _problem(row, images, known, has_masks)
        if problem:
            raise InputError(f"row {i} of the detections {problem.format(annotations)}")


def _all_fine(results: Sequence[Row], images: Mapping[Any, Any], known: set[int] | None) -> bool:
    """Whether there is no need to look at each row of half a million; masks are looked at."""
    if not results:
        return True
    try:
        boxes, scores = np.array([row["bbox"] for row in results]), np.array([row["score"] for row in results])
        categories = {row["category_id"] for row in results}
        return bool(
            {row["image_id"] for row in results} <= images.keys()
            and all(isinstance(category, numbers.Integral) for category in categories)
            and (known is None or categories <= known)
            and boxes.shape == (len(results), 4)
            and all(array.dtype.kind in "iuf" and np.isfinite(array).all() for array in (boxes, scores))
            and (boxes[:, 2:] >= 0).all()
            and not any("segmentation" in row for row in results)
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _problem(row: Row, images: Mapping[Any, Any], known: set[int] | None, masks: bool) -> str | None:
    """What is wrong with a detection, with a place for the annotations' name; None if nothing is."""
    missing = {"image_id", "category_id", "bbox", "score"} - row.keys()
    if missing:
        return f"has no {min(missing)}: give it COCO's results format"
    image_id, category, box, score = (row[key] for key in ("image_id", "category_id", "bbox", "score"))
    if not isinstance(image_id, numbers.Integral) or image_id not in images:
        return f"is of image {image_id!r}, which {{}} does not list: is it the right file?"
    if not isinstance(category, numbers.Integral) or (known is not None and category not in known):
        return f"is of category {category!r}, which {{}} does not list: is it the right file?"
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        return f"has bbox {box!r}: give x, y, width and height, finite and not negative"
    if not _is_number(score):
        return f"has score {score!r}: give a finite number"
    problem = _mask_problem(row.get("segmentation"), images[image_id]) if masks else None
    return problem and f"is of image {image_id}, and {problem}"


def _is_number(value: object) -> bool:
    return (is_number(value) or isinstance(value, np.number)) and bool(np.isfinite(value))


def _mask_problem(segmentation: Any, image: Mapping[str, Any]) -> str | None:
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), str | bytes):
        return "its segmentation is no compressed RLE: give size and counts, as pycocotools.mask.encode does"
    size, expected = stated_size(segmentation), (image.get("height"), image.get("width"))
    if size is None or (all(expected) and size != expected):  # pycocotools would find nothing, and not say so
        return f"its mask is of size {segmentation.get('size')}, the image of {expected}: give masks of the whole image"
    if not are_whole(segmentation["counts"], *size):
        return f"its mask's run lengths are not those of {size[1]}x{size[0]} pixels: give what pycocotools encodes"
    return None


def _box_rows(results: Sequence[Row]) -> list[Row]:
    """What pycocotools wants of each box, as its `loadRes` makes it; the user's rows stay as they are."""
    return [
        {
            "image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"], "score": row["score"],
            "area": row["bbox"][2] * row["bbox"][3], "id": i, "iscrowd": 0,
        }
        for i, row in enumerate(results, start=1)
    ]  # fmt: skip


def _mask_rows(results: Sequence[Row]) -> list[Row]:
    """As `_box_rows`, of masks: small and large is said of the mask's own area, as for the truth."""
    areas = [float(rle.area(row["segmentation"])) for row in results]  # it takes no list of more than 255
    return [
        {
            "image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"], "score": row["score"],
            "segmentation": dict(row["segmentation"]), "area": area, "id": i, "iscrowd": 0,
        }
        for i, (row, area) in enumerate(zip(results, areas, strict=True), start=1)
    ]  # fmt: skip


def _fill_masks(truth: Mapping[str, Any]) -> int:
    """Leave of each object's mask what pycocotools can read, and give those that have none their box; how many."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    filled = 0
    for annotation in truth["annotations"]:
        mask = annotation.get("segmentation")
        if not is_usable(mask, sizes[annotation["image_id"]]):
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x, y + h, x + w, y + h, x + w, y]]
            filled += 1
        elif isinstance(mask, list):
            annotation["segmentation"] = [points for points in mask if is_polygon(points)]
    return filled


def _figures(truth: dict[str, Any], rows: list[Row], kind: str, metric: Metric) -> dict[str, Any]:
    coco, evaluator = (COCO, COCOeval) if metric == "pycocotools" else _fast()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        indices = []
        for annotations in (truth["annotations"], rows):
            index = coco()
            index.dataset = truth | {"annotations": annotations}
            index.createIndex()
            indices.append(index)
        evaluation = evaluator(*indices, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = {name: float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    return values | {
        "images": len(truth["images"]), "detections": len(rows), "per_class": _per_class(evaluation, truth),
    }  # fmt: skip


def _fast() -> tuple[Any, Any]:
    try:
        import faster_coco_eval
    except ImportError:
        raise InputError("metric=fast needs faster-coco-eval: install the extra cspnet[fast]") from None
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def class_names(truth: Mapping[str, Any]) -> dict[int, str]:
    """The categories' names by id, in the ids' order; those of one name are told apart by their ids."""
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    names = Counter(str(category["name"]) for category in categories)
    return {
        entry["id"]: str(entry["name"]) if names[str(entry["name"])] == 1 else f"{entry['name']} ({entry['id']})"
        for entry in categories
    }


def _per_class(evaluation: Any, truth: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU thresholds, recalls, classes]; all areas
    per_class, names = {}, class_names(truth)
    for i, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, i]
        if (values > -1).any():
            per_class[names[category]] = {"AP": float(values.mean()), "AP50": float(values[0].mean())}
    return per_class
