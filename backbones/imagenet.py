"""The ImageNet data set, in the layouts that people have it in, and its loaders.

Layouts of `data.root`, each recognised by what is there:
    <root>/<split>/<class>/*.JPEG or <root>/<class>/*.JPEG   ImageFolder: WordNet ids, numbers, or any names
    <root>/<split>/*.JPEG or <root>/*.JPEG                   flat, with `data.ground_truth`
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backbones.augment import TrainAugment
from backbones.config import ImageData
from backbones.errors import InputError
from backbones.files import IMAGE_SUFFIXES, list_images
from backbones.preprocess import ClassifierPreprocess, classifier_pixels, decode

SPLITS = ("train", "val", "valid", "validation", "test")
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Sample:
    path: Path
    target: int


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The 1000 WordNet ids of ILSVRC2012 in class order, which is their sorted order."""
    return tuple(Path(__file__).with_name("imagenet_wnids.txt").read_text().split())


def class_names(num_classes: int) -> list[str]:
    """Names for a model without names of its own: WordNet ids if it has ImageNet's 1000 classes, else numbers."""
    return list(wordnet_ids()) if num_classes == 1000 else [str(i) for i in range(num_classes)]


def list_samples(
    data: ImageData, split: str, num_classes: int, classes: Sequence[str] | None = None
) -> tuple[list[Sample], list[str]]:
    """The images with their class indices, sorted by path, and the names of the `num_classes` classes.

    Class folders named by numbers are class indices. Other names are those of `classes`, what the model was
    trained on, if it is known. WordNet ids are ImageNet's if the model has 1000 classes. In both cases some
    of the classes will do. Otherwise the folders are the classes, in sorted order.

    Raises:
        InputError: nothing there, or classes that the model does not have.
    """
    if data.root is None:
        raise InputError("data.root is not set: give the data set's folder as data.root=/path")
    root = Path(data.root)
    if not root.is_dir():
        raise InputError(f"data.root={data.root} is no folder: give the data set's folder")
    folder = split_folder(root, split)
    if data.ground_truth is not None:
        return _flat(folder, data, num_classes), list(classes or class_names(num_classes))
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        flat = any(list_images(folder))
        problem = "images but no class folders" if flat else "no images"
        remedy = "give data.ground_truth=FILE" if flat else "give a folder of class folders as data.root"
        raise InputError(f"{folder} has {problem}: {remedy}")
    indices, known = _class_indices(names, folder, num_classes, classes)
    samples = [Sample(path, i) for name, i in zip(names, indices, strict=True) for path in list_images(folder / name)]
    if not samples:
        raise InputError(f"no images ({', '.join(IMAGE_SUFFIXES)}) below {folder}: is it the right folder?")
    return samples, known


def split_folder(root: Path, split: str) -> Path:
    """`root/split`, or `root` itself where there are no splits.

    Raises:
        InputError: there are splits, but not this one.
    """
    if (root / split).is_dir():
        return root / split
    others = [name for name in SPLITS if (root / name).is_dir()]
    if others:
        raise InputError(f"{root} has no folder {split!r} but {', '.join(others)}: set data.split or data.train_split")
    return root


def _class_indices(
    names: Sequence[str], folder: Path, num_classes: int, classes: Sequence[str] | None
) -> tuple[list[int], list[str]]:
    if all(name.isdecimal() for name in names):
        indices = [int(name) for name in names]
        if max(indices) >= num_classes:
            raise InputError(
                f"{folder}/{names[indices.index(max(indices))]} is no class of a model with num_classes={num_classes}: "
                "number the folders from 0"
            )
        return indices, list(classes or class_names(num_classes))
    if classes is not None and set(names) <= set(classes):
        return [classes.index(name) for name in names], list(classes)
    if num_classes == 1000 and all(WORDNET_ID.fullmatch(name) for name in names):
        return [_index_of(name, folder) for name in names], class_names(1000)
    if classes is not None:
        foreign = min(set(names) - set(classes))
        raise InputError(
            f"{folder}/{foreign} is none of the model's classes, {', '.join(classes[:5])}…: wrong data set?"
        )
    if len(names) != num_classes:
        raise InputError(
            f"{folder} has {len(names)} class folders but num_classes={num_classes}: "
            f"set num_classes={len(names)}, or name the folders by class number"
        )
    return list(range(len(names))), list(names)


def _index_of(wnid: str, where: Path) -> int:
    try:
        return wordnet_ids().index(wnid)
    except ValueError:
        raise InputError(f"{where}: {wnid} is none of ImageNet-1k's WordNet ids") from None


def _flat(folder: Path, data: ImageData, num_classes: int) -> list[Sample]:
    images = list_images(folder)
    if not images:
        raise InputError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {folder}: is it the right folder?")
    truth = Path(str(data.ground_truth))
    try:
        lines = [line.strip() for line in truth.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read data.ground_truth={truth}: {error}") from None
    if not lines:
        raise InputError(f"data.ground_truth={truth} is empty: one line an image")
    named = dict(_named_labels(lines))
    if named:
        missing = [path.name for path in images if path.stem not in named]
        if missing:
            raise InputError(f"{truth} has no class for {missing[0]} and {len(missing) - 1} more images of {folder}")
        labels = [named[path.stem] for path in images]
    elif len(lines) != len(images):
        raise InputError(f"{truth} has {len(lines)} lines but {folder} has {len(images)} images: one line an image")
    else:
        labels = lines
    targets = _targets(labels, truth, data.label_ids, num_classes)
    return [Sample(path, target) for path, target in zip(images, targets, strict=True)]


def _named_labels(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of file stem and label from `name label` lines or from a CSV such as Kaggle's LOC_val_solution.csv."""
    for row in csv.reader(lines) if "," in lines[0] else map(str.split, lines):
        if len(row) >= 2 and row[0] != "ImageId":
            yield Path(row[0]).stem, (row[1].split() or [""])[0]


def _targets(labels: Sequence[str], truth: Path, kind: str, num_classes: int) -> list[int]:
    """Class indices of WordNet ids, of class indices, or of ILSVRC2012 ids (1...1000, in the devkit's own order)."""
    if all(WORDNET_ID.fullmatch(label) for label in labels):
        return [_index_of(label, truth) for label in labels]
    wrong = next((label for label in labels if not label.isdecimal()), None)
    if wrong is not None:
        raise InputError(f"{truth}: {wrong!r} is neither a class number nor a WordNet id")
    numbers = [int(label) for label in labels]
    meta = truth.with_name("meta.mat")
    if kind == "auto":
        # Only class indices have a 0; only the devkit ships a meta.mat.
        kind = "index" if num_classes != 1000 or 0 in numbers else "ilsvrc2012" if meta.is_file() else "auto"
    if kind == "auto":
        raise InputError(
            f"{truth} may hold class indices (0...999) or ILSVRC2012 ids (1...1000): say data.label_ids=index, "
            f"or data.label_ids=ilsvrc2012 with the devkit's meta.mat beside it"
        )
    if kind == "ilsvrc2012":
        numbers = [_devkit_index(number, truth, meta) for number in numbers]
    if max(numbers) >= num_classes:
        raise InputError(f"{truth}: class {max(numbers)} is not in 0...{num_classes - 1}")
    return numbers


def _devkit_index(number: int, truth: Path, meta: Path) -> int:
    ids = _devkit_order(meta)
    if number not in ids:
        raise InputError(f"{truth}: {number} is no ILSVRC2012 id of {meta}")
    return ids[number]


@cache
def _devkit_order(meta: Path) -> dict[int, int]:
    """ILSVRC2012 id -> class index, from the development kit's meta.mat."""
    from scipy.io import loadmat  # needed for this file alone

    try:
        rows = loadmat(meta, squeeze_me=True)["synsets"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read {meta} ({error}): put the devkit's meta.mat beside the ground truth") from None
    return {int(row["ILSVRC2012_ID"]): _index_of(str(row["WNID"]), meta) for row in rows if row["num_children"] == 0}


class ImageNet(Dataset[Any]):
    """Items are (pixels uint8 [H, W, 3], class index), the evaluation's pixels or, with `augment`, training's."""

    def __init__(
        self, samples: Sequence[Sample], preprocess: ClassifierPreprocess, augment: TrainAugment | None = None
    ):
        self.samples, self.preprocess, self.augment = samples, preprocess, augment

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        image = decode(sample.path)
        if self.augment is None:
            pixels = classifier_pixels(image, self.preprocess)
        else:
            pixels = self.augment(np.asarray(image), index)
        return torch.from_numpy(pixels.copy()), sample.target


def create_loader(
    dataset: ImageNet, batch_size: int, workers: int, shuffle_seed: int | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches (uint8 [N, H, W, 3], int64 [N]); in order, or shuffled by a seed and without an odd last one."""
    shuffle = shuffle_seed is not None
    generator = torch.Generator().manual_seed(shuffle_seed or 0)
    drop_last = shuffle and len(dataset) >= batch_size
    return DataLoader(
        dataset, batch_size, shuffle=shuffle, num_workers=workers, drop_last=drop_last, generator=generator,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
