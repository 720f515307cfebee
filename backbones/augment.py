"""Training augmentation of classifiers, through albumentations; reproducible whatever the number of workers."""

import os

import numpy as np

from backbones.preprocess import Pixels

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for its newest version
import albumentations

__all__ = ["TrainAugment", "albumentations", "sample_seed"]


def sample_seed(*numbers: int) -> int:
    """A 32-bit seed from (run's seed, epoch, index): the same sample is drawn alike in every process."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainAugment:
    """Random resized crop to `size` x `size`, flips, colour jitter; `epoch` is set by the training loop."""

    def __init__(
        self, size: int, min_scale: float, horizontal_flip: float, vertical_flip: float, color_jitter: float, seed: int
    ):
        strength = (1 - color_jitter, 1 + color_jitter)
        self.transform = albumentations.Compose(
            [
                albumentations.RandomResizedCrop((size, size), scale=(min_scale, 1.0)),
                albumentations.HorizontalFlip(p=horizontal_flip),
                albumentations.VerticalFlip(p=vertical_flip),
                albumentations.ColorJitter(
                    strength, strength, strength, hue=(-color_jitter / 10, color_jitter / 10), p=0.8
                ),
            ]
        )
        self.seed, self.epoch = seed, 0

    def __call__(self, pixels: Pixels, index: int) -> Pixels:
        """uint8 [h, w, 3] -> uint8 [size, size, 3]."""
        self.transform.set_random_seed(sample_seed(self.seed, self.epoch, index))
        augmented: Pixels = self.transform(image=pixels)["image"]
        return augmented
