"""ImageNet, or any set of images with classes, for PyTorch: the data set of `samples.py`'s samples, and its loader."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from backbones.preprocess import ClassifierPreprocess, Decoder, ImageError, Pixels, classifier_pixels, decode
from backbones.samples import Sample


class Augment(Protocol):
    """Training's augmentation: uint8 [h, w, 3] of the image `index` to uint8 [H, W, 3]."""

    def __call__(self, pixels: Pixels, index: int) -> Pixels: ...


class ImageNet(Dataset[Any]):
    """Items are (pixels uint8 [H, W, 3], index), the evaluation's pixels or, with `augment`, training's.

    `targets` int64 [len] are the class indices of `samples`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: ClassifierPreprocess,
        augment: Augment | None = None,
        *,
        decoder: Decoder = "pillow",
        on_error: Literal["stop", "skip"] = "stop",
    ):
        self.samples, self.preprocess, self.augment = samples, preprocess, augment
        self.decoder, self.on_error = decoder, on_error
        self.targets = torch.tensor([sample.target for sample in samples], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image.

        Raises:
            ImageError: it cannot be decoded; the message names it, whatever `on_error` says.
        """
        sample = self.samples[index]
        try:
            image = decode(sample.load(), decoder=self.decoder)
            if self.augment is None:
                pixels = classifier_pixels(image, self.preprocess)
            else:
                pixels = self.augment(np.asarray(image), index)
        except ImageError as error:
            message = str(error)
            raise ImageError(message if sample.name in message else f"{sample.name}: {message}") from None
        return torch.from_numpy(np.array(pixels)), index

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]] | ImageError:
        """A batch as the loader fetches it: without what is skipped, or the error to stop with.

        The error is a value, since one that a worker raises arrives wrapped in its traceback.
        """
        items = []
        for index in indices:
            try:
                items.append(self[index])
            except ImageError as error:
                if self.on_error == "stop":
                    return error
        return items

    def collate(self, items: list[tuple[Tensor, int]] | ImageError) -> tuple[Tensor, Tensor] | ImageError:
        """uint8 [n, H, W, 3] and int64 [n], in memory that worker and trainer share; n may be 0."""
        if isinstance(items, ImageError):
            return items
        if not items:
            crop = self.preprocess.crop
            return torch.empty((0, crop, crop, 3), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        pixels, indices = default_collate(items)
        return pixels, indices


class Loader(DataLoader[Any]):
    """Batches (uint8 [n, H, W, 3], int64 indices [n])."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, ImageError):
                raise batch
            yield batch


def create_loader(dataset: ImageNet, batch_size: int, workers: int, indices: Sequence[int] | None = None) -> Loader:
    """Batches (uint8 [n, H, W, 3], int64 indices [n]) of the images `indices`, in their order, or of all.

    With `on_error="skip"` a batch lacks the images that could not be decoded; n may be 0.

    Raises:
        ImageError: on iteration, at an image that cannot be decoded, with `on_error="stop"`.
    """
    return Loader(
        dataset,
        batch_size,
        sampler=range(len(dataset)) if indices is None else indices,
        num_workers=workers,
        collate_fn=dataset.collate,
        generator=torch.Generator(),  # a loader draws its workers' seed; the trainer's own numbers stay as they are
        pin_memory=torch.cuda.is_available(),
    )
