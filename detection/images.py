"""The images of a COCO-format data set, with boxes for training or as the artefacts see them for evaluation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess, Fitted, decode, detector_pixels, upright_size
from detection.augment import DetectionAugment, Sample
from detection.coco import CocoSet, Record
from detection.masks import decode as decode_mask

Target = dict[str, Tensor]


class TrainingImages(Dataset[tuple[Tensor, Target]]):
    """Items are (uint8 [h, w, 3], {"boxes" [K, 4], "labels" [K]}) at the model's size.

    Args:
        masks: add "masks" uint8 [K, h, w] to the targets; the data set was read with them.
    """

    def __init__(
        self, dataset: CocoSet, preprocess: DetectorPreprocess, augment: DetectionAugment, masks: bool = False
    ):
        assert not masks or all(record.segmentations is not None for record in dataset.records), "read_coco(masks=True)"
        self.records, self.preprocess, self.augment, self.masks = dataset.records, preprocess, augment, masks

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        sample = self.augment(index, len(self), self.load, self.preprocess)
        whole = (sample.boxes[:, 2:] > sample.boxes[:, :2]).all(axis=1)  # rounding may have closed a sliver
        sample = sample[np.flatnonzero(whole)]
        target = {"boxes": torch.from_numpy(sample.boxes), "labels": torch.from_numpy(sample.labels)}
        if sample.masks is not None:
            target["masks"] = torch.from_numpy(sample.masks)
        return torch.from_numpy(sample.pixels.copy()), target  # a flipped array's strides are below 0

    def load(self, index: int) -> Sample:
        """An image with its objects, as they are in the data set."""
        record = self.records[index]
        image = _decode(record)
        masks = _masks(record, image.height, image.width) if self.masks else None
        return Sample(np.asarray(image), record.boxes, record.labels, masks)


def _masks(record: Record, h: int, w: int) -> npt.NDArray[np.uint8]:
    """The masks [K, h, w]; that of an object without a usable one is its box."""
    masks = np.zeros((len(record.labels), h, w), np.uint8)
    for mask, box, segmentation in zip(masks, record.boxes, record.segmentations or (), strict=True):
        if segmentation is not None:
            mask[:] = decode_mask(segmentation, h, w)
        if not mask.any():
            (left, top), (right, bottom) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
            mask[top:bottom, left:right] = 1
    return masks


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


def aspect_ratios(dataset: CocoSet) -> list[float]:
    """Width over height of each image, from the annotations or else from the file's header.

    Raises:
        ImageError: no image.
    """
    sizes = (record.size or upright_size(record.path)[0] for record in dataset.records)
    return [width / height for height, width in sizes]


def to_image(pixels: Tensor) -> Tensor:
    """uint8 [h, w, 3] -> float32 [3, h, w] in [0, 1], what torchvision's detectors take.

    It has four times the bytes: call it on the detector's device.
    """
    return pixels.permute(2, 0, 1).float() / 255


def create_loader(
    dataset: TrainingImages | EvaluationImages, batch_size: int, workers: int, indices: Sequence[int] | None = None
) -> DataLoader[Any]:
    """Batches as pairs of tuples, of the images `indices`, in their order, or of all."""
    order = range(len(dataset)) if indices is None else indices
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size,
        sampler=order,
        num_workers=min(workers, -(-len(order) // batch_size)),  # one without a batch would start for nothing
        collate_fn=_collate,
        generator=torch.Generator(),  # a loader draws its workers' seed; the trainer's own numbers stay as they are
        pin_memory=torch.cuda.is_available(),
    )


def _collate(batch: Sequence[tuple[Any, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    first, second = zip(*batch, strict=True)
    return first, second
