"""COCO-format data sets: read and cleaned once, then images with boxes for training or evaluation.

Category ids may be any integers, with gaps; label i is the i-th smallest id, from 1, and 0 the background.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backbones.errors import InputError
from backbones.files import read_json
from backbones.preprocess import DetectorPreprocess, Fitted, decode, detector_pixels
from detection.augment import DetectionAugment

Target = dict[str, Tensor]
MIN_SIDE = 0.1  # pixels; a box thinner than that may vanish when it is scaled in float32


@dataclass(frozen=True)
class Record:
    """One image: `boxes` float32 [K, 4] as x1, y1, x2, y2 in pixels, `labels` int64 [K]; crowds left out."""

    image_id: int
    path: Path
    size: tuple[int, int] | None  # height, width, if the file says them
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


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


def read_coco(images: str | None, annotations: str | None, what: str = "data") -> CocoSet:
    """Read an annotation file; boxes are clipped to their image, and those without area dropped, each counted.

    Args:
        what: the config's prefix of the two keys, for messages.

    Raises:
        InputError: a missing folder, file or image, or no COCO annotations.
    """
    if images is None or annotations is None:
        raise InputError(f"{what}images and {what}annotations are not both set: give the folder and the JSON file")
    if not Path(images).is_dir():
        raise InputError(f"{what}images={images} is no folder")
    raw = load_annotations(annotations)
    categories = sorted(raw["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: i + 1 for i, category in enumerate(categories)}
    of_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in raw["images"]}
    for annotation in raw["annotations"]:
        if annotation["image_id"] not in of_image or annotation["category_id"] not in label_of:
            raise InputError(f"{annotations}: annotation {annotation['id']} is of an unknown image or category")
        of_image[annotation["image_id"]].append(annotation)
    dataset = CocoSet([], tuple(label_of), tuple(str(category["name"]) for category in categories))
    for image in raw["images"]:
        path = Path(images) / image["file_name"]
        if not path.is_file():
            raise InputError(f"{annotations} lists {image['file_name']}, which is not in {images}")
        size = (image["height"], image["width"]) if image.get("height") and image.get("width") else None
        boxes, labels = _clean(of_image[image["id"]], size, label_of, dataset.cleaned)
        dataset.records.append(Record(image["id"], path, size, boxes, labels))
    return dataset


def load_annotations(path: str | Path) -> dict[str, Any]:
    """An annotation file with every optional key that pycocotools relies on filled in.

    Raises:
        InputError: missing, no JSON, or not COCO's format.
    """
    raw = read_json(path)
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key), list) for key in ("images", "categories")):
        raise InputError(f"{path} is not in COCO's format: it needs lists of images, categories and annotations")
    for key, empty in (("annotations", []), ("info", {}), ("licenses", [])):
        raw.setdefault(key, empty)
    try:
        for image in raw["images"]:
            image["id"], image["file_name"]
        for category in raw["categories"]:
            category.setdefault("name", str(category["id"]))
        for what in ("images", "categories"):
            ids = [entry["id"] for entry in raw[what]]
            if len(set(ids)) < len(ids) or not ids or not all(isinstance(i, int) for i in ids):
                raise InputError(f"{path}: its {what} need ids, one integer each and no two alike")
        for i, annotation in enumerate(raw["annotations"]):
            annotation["id"] = i + 1  # pycocotools counts an object of id 0, or of an id twice, as not found
            _, _, w, h = (float(value) for value in annotation["bbox"])
            annotation.setdefault("area", w * h)
            annotation.setdefault("iscrowd", 0)
            annotation["image_id"], annotation["category_id"]
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not in COCO's format: an entry lacks or breaks {error}") from None
    return raw


def _clean(
    annotations: Sequence[Mapping[str, Any]],
    size: tuple[int, int] | None,
    label_of: Mapping[int, int],
    cleaned: dict[str, int],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    boxes, labels = [], []
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
        labels.append(label_of[annotation["category_id"]])
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


class TrainingImages(Dataset[tuple[Tensor, Target]]):
    """Items are (float32 [3, h, w] in [0, 1], {"boxes" [K, 4], "labels" [K]}) at the model's size."""

    def __init__(self, dataset: CocoSet, preprocess: DetectorPreprocess, augment: DetectionAugment):
        self.records, self.preprocess, self.augment = dataset.records, preprocess, augment

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        record = self.records[index]
        image = _decode(record)
        augmented, boxes, labels = self.augment(image, record.boxes, record.labels, index)
        fitted = detector_pixels(augmented, self.preprocess)
        (h, w), (oh, ow) = fitted.pixels.shape[:2], fitted.original
        boxes = boxes * np.array([w / ow, h / oh, w / ow, h / oh], np.float32)
        whole = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # a crop may have left a sliver
        target = {"boxes": torch.from_numpy(boxes[whole]), "labels": torch.from_numpy(labels[whole])}
        return to_image(fitted.pixels), target


class EvaluationImages(Dataset[tuple[int, Fitted]]):
    """Items are (image id, the image as the artefacts see it)."""

    def __init__(self, dataset: CocoSet, preprocess: DetectorPreprocess):
        self.records, self.preprocess = dataset.records, preprocess

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, Fitted]:
        record = self.records[index]
        return record.image_id, detector_pixels(_decode(record), self.preprocess)


def _decode(record: Record) -> Image.Image:
    image = decode(record.path)
    if record.size is not None and (image.height, image.width) != record.size:
        raise InputError(
            f"{record.path} is {image.width}x{image.height} upright, but its annotations say "
            f"{record.size[1]}x{record.size[0]}: its boxes would be wrong"
        )
    return image


def to_image(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 [h, w, 3] -> float32 [3, h, w] in [0, 1], what torchvision's detectors take."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def create_loader(
    dataset: Dataset[Any], batch_size: int, workers: int, shuffle_seed: int | None = None
) -> DataLoader[Any]:
    """Batches as pairs of tuples; in order, or shuffled by a seed."""
    return DataLoader(
        dataset, batch_size, shuffle=shuffle_seed is not None, num_workers=workers, collate_fn=_collate,
        generator=torch.Generator().manual_seed(shuffle_seed or 0),
    )  # fmt: skip


def _collate(batch: Sequence[tuple[Any, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    first, second = zip(*batch, strict=True)
    return first, second
