"""Training augmentation of classifiers, through albumentations; reproducible whatever the number of workers."""

import math
import os
import random
from typing import Any

import numpy as np

from backbones.preprocess import Pixels

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for its newest version
import albumentations
import cv2

# The loader's workers share the cores already: OpenCV's own threads in each of them cost a tenth of the CPU's time.
cv2.setNumThreads(0)

__all__ = ["TrainAugment", "albumentations", "randaugment", "sample_seed"]

GRAY = (128, 128, 128)  # what a rotation or shift uncovers


def sample_seed(*numbers: int) -> int:
    """A 32-bit seed from (run's seed, epoch, index): the same sample is drawn alike in every process."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainAugment:
    """Random resized crop to `size` x `size`, flips, colour jitter, `randaugment`, random erasing by noise.

    `epoch` is set by the training loop. The crop shrinks by area, as evaluation's resize is antialiased too.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        min_scale: float = 0.08,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        color_jitter: float = 0.0,
        magnitude: int = 0,
        random_erasing: float = 0.0,
    ):
        strength = (1 - color_jitter, 1 + color_jitter)
        transforms: list[Any] = [
            albumentations.RandomResizedCrop((size, size), scale=(min_scale, 1.0), area_for_downscale="image"),
            albumentations.HorizontalFlip(p=horizontal_flip),
            albumentations.VerticalFlip(p=vertical_flip),
        ]
        if color_jitter:
            hue = (-color_jitter / 10, color_jitter / 10)
            transforms.append(albumentations.ColorJitter(strength, strength, strength, hue, p=0.8))
        if magnitude:
            transforms.append(randaugment(magnitude))
        if random_erasing:
            transforms.append(albumentations.Erasing(scale=(0.02, 1 / 3), fill="random", p=random_erasing))
        self.transform = albumentations.Compose(transforms)
        self.seed, self.epoch = seed, 0

    def __call__(self, pixels: Pixels, index: int) -> Pixels:
        """uint8 [h, w, 3] -> uint8 [size, size, 3]."""
        seed = sample_seed(self.seed, self.epoch, index)
        # One state for all: `set_random_seed` gives each transform the same one, and crop, flip and jitter go together.
        self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        augmented: Pixels = self.transform(image=pixels)["image"]
        return augmented


def randaugment(magnitude: int) -> Any:
    """Two operations an image, each drawn anew from fourteen and applied half of the time.

    At the share m = magnitude / 10: rotation by up to 30° m; shear in x or y by up to atan(0.3 m); shift in x or y
    by up to 0.45 m of the side; brightness, contrast and saturation changed by a factor of 1 ± 0.9 m; an unsharp
    mask of 3 pixels by up to 0.9 m; posterise to 4 - 4 m bits, rounded up, but one at least; solarise above 1 - m of
    the range; auto-contrast, equalise and invert at any magnitude.

    After Cubuk et al., "RandAugment", arXiv 1909.13719, in the strengths of timm's `rand-mM-inc1`. It differs from
    timm's in that a strength is uniform up to its limit rather than normal around the magnitude (`mstd`), that
    sharpness only grows, that posterise and solarise do not have their "add" and "original" forms, and that
    OpenCV's filters and border are at work, not Pillow's.
    """
    share = magnitude / 10
    shear, shift, factor = math.degrees(math.atan(0.3 * share)), 0.45 * share, (1 - 0.9 * share, 1 + 0.9 * share)
    same = (1.0, 1.0)

    def affine(**settings: Any) -> Any:
        return albumentations.Affine(fill=GRAY, p=0.5, **settings)

    return albumentations.RandomOrder(  # SomeOf would have geometry before colour
        [
            affine(rotate=(-30 * share, 30 * share)),
            affine(shear={"x": (-shear, shear), "y": (0, 0)}),
            affine(shear={"x": (0, 0), "y": (-shear, shear)}),
            affine(translate_percent={"x": (-shift, shift), "y": (0, 0)}),
            affine(translate_percent={"x": (0, 0), "y": (-shift, shift)}),
            albumentations.ColorJitter(brightness=factor, contrast=same, saturation=same, hue=(0, 0), p=0.5),
            albumentations.ColorJitter(brightness=same, contrast=factor, saturation=same, hue=(0, 0), p=0.5),
            albumentations.ColorJitter(brightness=same, contrast=same, saturation=factor, hue=(0, 0), p=0.5),
            # not its Sharpen, whose "gaussian" method wraps round below 0
            albumentations.UnsharpMask(blur_limit=(3, 3), alpha=(0, 0.9 * share), threshold=0, p=0.5),
            albumentations.Posterize(num_bits=max(1, 4 - math.floor(4 * share)), p=0.5),
            albumentations.Solarize(threshold_range=(1 - share, 1 - share), p=0.5),
            albumentations.AutoContrast(p=0.5),
            albumentations.Equalize(p=0.5),
            albumentations.InvertImg(p=0.5),
        ],
        n=2,
        replace=True,
    )
