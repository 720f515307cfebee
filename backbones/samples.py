"""The samples of ImageNet, or of any set of images with classes: `layouts.py` finds the images and `labels.py` their
classes; no torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backbones.config import ImageData
from backbones.errors import InputError
from backbones.labels import class_indices, class_names, ground_truth, real_labels
from backbones.layouts import Source, find_images


@dataclass(frozen=True)
class Sample:
    """An image, what messages and reports call it, its class index and, where they are asked for, its ReaL labels."""

    name: str
    target: int
    source: Source
    real: tuple[int, ...] | None = None

    def load(self) -> bytes | Path:
        """What `preprocess.decode` takes."""
        return self.source if isinstance(self.source, Path) else self.source.read()


def list_samples(
    data: ImageData, split: str, num_classes: int, classes: Sequence[str] | None = None
) -> tuple[list[Sample], list[str]]:
    """The images of a split with their class indices, and the names of the `num_classes` classes.

    `labels.class_indices` says which index a class gets; `classes` are those that the model was trained on.
    `data.ground_truth` and `data.real_labels` are of `data.split` alone.

    Raises:
        InputError: nothing there, or classes that the model does not have.
    """
    if data.root is None:
        raise InputError("data.root is not set: give the data set's folder as data.root=/path")
    truth = data.ground_truth if split == data.split else None
    listing = find_images(Path(data.root), split, flat=truth is not None)
    names = [image.name for image in listing.images]
    if truth is not None:
        known = list(classes or class_names(num_classes))
        targets = ground_truth(names, listing.where, Path(truth), data.label_ids, num_classes)
    else:
        indices, known = class_indices(listing.classes, listing.where, num_classes, classes)
        index_of = dict(zip(listing.classes, indices, strict=True))
        targets = [index_of[str(image.label)] for image in listing.images]
    reals: list[tuple[int, ...] | None] = [None] * len(names)
    if data.real_labels is not None and split == data.split:
        if num_classes != 1000:
            raise InputError(
                f"data.real_labels are of ImageNet's 1000 classes, num_classes={num_classes}: leave it out"
            )
        reals = [*real_labels(Path(data.real_labels), names)]
    samples = [
        Sample(image.name, target, image.source, real)
        for image, target, real in zip(listing.images, targets, reals, strict=True)
    ]
    return samples, known
