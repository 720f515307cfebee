"""COCO-format annotations, read and cleaned once; `images.py` loads the images.

Category ids may be any integers, with gaps; label i is the i-th smallest id, from 1, and 0 the background.
"""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backbones.errors import InputError
from backbones.files import read_json
from backbones.preprocess import upright_size
from detection.findings import box_of, hashable, integer, is_number, pixels, short
from detection.masks import Segmentation, is_usable

LISTS = ("images", "categories", "annotations")
MIN_SIDE = 0.1  # pixels; a box thinner than that may vanish when it is scaled in float32


@dataclass(frozen=True)
class Record:
    """One image: `boxes` float32 [K, 4] as x1, y1, x2, y2 in pixels, `labels` int64 [K]; crowds left out."""

    image_id: int
    path: Path
    size: tuple[int, int] | None  # height, width, if the file says them
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    segmentations: tuple[Segmentation | None, ...] | None = None  # K, if they were asked for; None where unusable


@dataclass
class CocoSet:
    """A data set as read, with counts of what was cleaned."""

    records: list[Record]
    category_ids: tuple[int, ...]
    classes: tuple[str, ...]
    cleaned: dict[str, int] = field(default_factory=lambda: {"crowds": 0, "clipped": 0, "dropped": 0})

    def check_categories(self, ids: Sequence[int], classes: Sequence[str], model: object) -> None:
        """That a model's categories are this data set's.

        Raises:
            InputError: they have no id in common, or one id with two names.
        """
        theirs, ours = dict(zip(ids, classes, strict=True)), dict(zip(self.category_ids, self.classes, strict=True))
        if not theirs.keys() & ours.keys():
            raise InputError(f"{model} and the annotations have no category id in common: is it the right data set?")
        for category in theirs.keys() & ours.keys():
            if theirs[category] != ours[category]:
                raise InputError(
                    f"category {category} is {theirs[category]!r} for {model} and {ours[category]!r} in the "
                    "annotations: is it the right data set?"
                )

    def __str__(self) -> str:
        boxes = sum(len(record.labels) for record in self.records)
        empty = sum(not len(record.labels) for record in self.records)
        counts = ", ".join(f"{count} {what}" for what, count in self.cleaned.items())
        return f"{len(self.records)} images ({empty} without objects), {boxes} boxes; {counts}"


def read_coco(
    images: str | None, annotations: str | None, what: str = "data", *, masks: bool = False, sized: bool = False
) -> CocoSet:
    """Read an annotation file; boxes are clipped to their image, and those without area dropped, each counted.

    Args:
        what: the config's prefix of the two keys, for messages.
        masks: keep the segmentations. An object without a usable one is counted, and has its box for a mask
            (torchvision's reference training stops at such an object).
        sized: if there are masks, the images need height and width, as the masks' evaluation does.

    Raises:
        InputError: a missing folder, file or image, no COCO annotations, none with a mask, or no sizes; an image with
            objects that has no size here either.
    """
    if images is None or annotations is None:
        raise InputError(f"{what}images and {what}annotations are not both set: give the folder and the JSON file")
    if not Path(images).is_dir():
        raise InputError(f"{what}images={images} is no folder")
    raw = _read(annotations, _keep_compact if masks else _drop_segmentation)
    categories = sorted(raw["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: i + 1 for i, category in enumerate(categories)}
    of_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in raw["images"]}
    for annotation in raw["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    if sized and any(annotation.get("segmentation") for annotation in raw["annotations"]):
        check_sizes(raw)
    dataset = CocoSet([], tuple(label_of), tuple(str(category["name"]) for category in categories))
    if masks:
        dataset.cleaned["without_mask"] = 0
    for image in raw["images"]:
        path = Path(images) / image["file_name"]
        if not path.is_file():
            raise InputError(f"{annotations} lists {image['file_name']}, which is not in {images}")
        size = (image["height"], image["width"]) if image.get("height") and image.get("width") else None
        objects = of_image.pop(image["id"])
        within = size or (upright_size(path)[0] if objects else None)
        boxes, kept = _clean(objects, within, dataset.cleaned)
        labels = np.array([label_of[annotation["category_id"]] for annotation in kept], np.int64)
        segmentations = _segmentations(kept, within, dataset.cleaned) if masks else None
        dataset.records.append(Record(image["id"], path, size, boxes, labels, segmentations))
    if masks and not any(one is not None for record in dataset.records for one in record.segmentations or ()):
        raise InputError(f"{annotations} has no segmentations to learn masks from: choose a detector without masks")
    return dataset


def load_annotations(path: str | Path) -> dict[str, Any]:
    """An annotation file as pycocotools takes it: optional keys filled in, and objects numbered from 1, since it
    counts one of id 0, or of an id twice, as not found.

    Raises:
        InputError: missing, no JSON, or not COCO's format.
    """
    raw = _read(path)
    for i, annotation in enumerate(raw["annotations"]):
        annotation["id"] = i + 1
    return raw


def check_sizes(raw: Mapping[str, Any]) -> None:
    """That the images of annotations say their sizes.

    Raises:
        InputError: it names one that does not.
    """
    for image in raw["images"]:
        if not image.get("height") or not image.get("width"):
            raise InputError(
                f"image {image['id']} of the annotations needs height and width to evaluate masks: add them"
            )


def _read(path: str | Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    raw = read_json(path, hook)
    if isinstance(raw, dict):
        for key, empty in (("annotations", []), ("info", {}), ("licenses", [])):
            raw.setdefault(key, empty)
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key), list) for key in LISTS):
        raise InputError(f"{path} is not in COCO's format: it needs lists of {', '.join(LISTS)}")
    try:
        known = [_ids(raw[what], what, path) for what in ("images", "categories")]
        for image in raw["images"]:
            _check_image(image)
        for category in raw["categories"]:
            _fill(category, "name", str(category["id"]))
        for annotation in raw["annotations"]:
            _check_annotation(annotation)
            for key, ids in zip(("image_id", "category_id"), known, strict=True):
                if hashable(annotation[key]) not in ids:
                    raise InputError(
                        f"{path}: annotation {annotation.get('id', 'without id')} is of an unknown image or category: "
                        f"`python -m detection check-data --annotations {path}` lists them all"
                    )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not in COCO's format: an entry lacks or breaks {error}; "
            f"`python -m detection check-data --annotations {path}` names it"
        ) from None
    return raw


def _ids(entries: Sequence[Mapping[str, Any]], what: str, path: object) -> set[int]:
    ids = [integer(entry["id"]) for entry in entries]
    if not ids or len(set(ids)) < len(ids) or not all(i is not None and -(2**63) <= i < 2**63 for i in ids):
        raise InputError(f"{path}: its {what} need ids, one integer each and no two alike")
    return {i for i in ids if i is not None}


def _check_image(image: dict[str, Any]) -> None:
    if not isinstance(image["file_name"], str):
        raise ValueError(f"file_name={image['file_name']!r}")
    for side in ("width", "height"):
        given = image.get(side)
        if given is not None and given != 0:  # 0 is not known either
            image[side] = pixels(given)
            if image[side] is None:
                raise ValueError(f"{side}={given!r}")


def _check_annotation(annotation: dict[str, Any]) -> None:
    """Checked and, where optional keys are missing or null, filled in."""
    box = box_of(annotation)
    if box is None:
        raise ValueError(f"bbox={short(annotation.get('bbox'))}")
    _fill(annotation, "area", float(box[2]) * float(box[3]))
    _fill(annotation, "iscrowd", 0)
    if not is_number(annotation["area"]):
        raise ValueError(f"area={short(annotation['area'])}")
    if annotation["iscrowd"] not in (0, 1):
        raise ValueError(f"iscrowd={short(annotation['iscrowd'])}")


def _fill(entry: dict[str, Any], key: str, value: object) -> None:
    if entry.get(key) is None:
        entry[key] = value


# While the file is parsed: a polygon as Python numbers is four times as large, and COCO has 43 million of them.


def _drop_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    if "segmentation" in entry:
        entry["segmentation"] = bool(entry["segmentation"])  # whether there is one
    return entry


def _keep_compact(entry: dict[str, Any]) -> dict[str, Any]:
    segmentation = entry.get("segmentation")
    if entry.get("iscrowd"):
        entry.pop("segmentation", None)
    elif isinstance(segmentation, list):
        try:
            entry["segmentation"] = [array("d", points) for points in segmentation]
        except (TypeError, OverflowError):
            entry["segmentation"] = None  # no numbers: not usable
    return entry


def _clean(
    annotations: Sequence[dict[str, Any]], size: tuple[int, int] | None, cleaned: dict[str, int]
) -> tuple[npt.NDArray[np.float32], list[dict[str, Any]]]:
    """The boxes [K, 4] that training can use, and their annotations."""
    boxes, kept = [], []
    height, width = size or (math.inf, math.inf)
    for annotation in annotations:
        if annotation["iscrowd"]:
            cleaned["crowds"] += 1
            continue
        x, y, w, h = (float(value) for value in annotation["bbox"])
        box = (max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height))
        if not all(map(math.isfinite, (x, y, w, h))) or min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
            cleaned["dropped"] += 1
            continue
        cleaned["clipped"] += max(abs(a - b) for a, b in zip(box, (x, y, x + w, y + h), strict=True)) > 0.5
        boxes.append(box)
        kept.append(annotation)
    return np.array(boxes, np.float32).reshape(-1, 4), kept


def _segmentations(
    annotations: Sequence[Mapping[str, Any]], size: tuple[int, int] | None, cleaned: dict[str, int]
) -> tuple[Segmentation | None, ...]:
    given = [annotation.get("segmentation") for annotation in annotations]
    usable = tuple(one if one is not None and is_usable(one, size) else None for one in given)
    cleaned["without_mask"] += sum(one is None for one in usable)
    return usable
