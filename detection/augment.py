"""Box-aware training augmentation; reproducible whatever the number of workers.

Shapes: h, w a picture's size, K its objects.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from backbones.augment import GRAY, albumentations, sample_seed
from backbones.preprocess import DetectorPreprocess, Pixels, fitted_size, resampling

# What a window over a picture keeps: this share of a box, and this many pixels of each side.
MIN_VISIBLE = 0.2
MIN_PIXELS = 1.0
Window = tuple[float, float, float, float]


@dataclass(frozen=True)
class Sample:
    """A picture with its objects; all of them go through every step alike."""

    pixels: Pixels  # [h, w, 3]
    boxes: npt.NDArray[np.float32]  # [K, 4] as x1, y1, x2, y2 in pixels
    labels: npt.NDArray[np.int64]  # [K]
    masks: npt.NDArray[np.uint8] | None = None  # [K, h, w]

    @property
    def size(self) -> tuple[int, int]:
        """h, w."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def __getitem__(self, index: npt.NDArray[np.int64]) -> "Sample":
        """The same picture with some of its objects."""
        masks = self.masks if self.masks is None else self.masks[index]
        return Sample(self.pixels, self.boxes[index], self.labels[index], masks)


class DetectionAugment:
    """In this order: mosaic, a crop that keeps every box, flips, colour jitter, and the resize to the model's size.

    `epoch` is set by the training loop.

    Args:
        horizontal_flip, vertical_flip, random_crop, mosaic: probabilities.
        color_jitter: of brightness, contrast and saturation; a tenth of it of hue.
        scale_jitter: the smallest and the largest factor of the fitted size, to which a larger picture is then
            cropped: large-scale jitter (Ghiasi et al., arXiv 2012.07177). A smaller one is left for the batch to pad.
        min_sizes: short sides to choose from; empty is the model's own.
    """

    def __init__(
        self,
        horizontal_flip: float = 0.0,
        vertical_flip: float = 0.0,
        color_jitter: float = 0.0,
        random_crop: float = 0.0,
        *,
        seed: int,
        scale_jitter: tuple[float, float] | None = None,
        min_sizes: tuple[int, ...] = (),
        mosaic: float = 0.0,
    ):
        strength, hue = (1 - color_jitter, 1 + color_jitter), (-color_jitter / 10, color_jitter / 10)
        self.transform = albumentations.Compose(
            [
                albumentations.HorizontalFlip(p=horizontal_flip),
                albumentations.VerticalFlip(p=vertical_flip),
                albumentations.ColorJitter(strength, strength, strength, hue, p=0.8 if color_jitter else 0.0),
            ],
            # clip: rounding may leave a box a hair outside its image, which albumentations else rejects
            bbox_params=albumentations.BboxParams(
                "pascal_voc", label_fields=["objects"], clip=True, filter_invalid_bboxes=True
            ),
        )
        self.random_crop, self.mosaic = random_crop, mosaic
        self.scale_jitter, self.min_sizes = scale_jitter, min_sizes
        self.seed, self.epoch = seed, 0

    def __call__(self, index: int, count: int, load: Callable[[int], Sample], spec: DetectorPreprocess) -> Sample:
        """Image `index` of `count` at the model's size, no larger than its fitted size; `load` gives any of them."""
        seed = sample_seed(self.seed, self.epoch, index)
        rng = np.random.default_rng(seed)
        sample = load(index)
        size = fitted_size(*sample.size, spec)
        if rng.random() < self.mosaic and min(size) > 1:
            others = map(load, rng.integers(count, size=3).tolist())  # one at a time in memory
            sample = mosaic(sample, others, size, rng, spec)
        if rng.random() < self.random_crop:
            sample = safe_crop(sample, rng)
        sample = self._recolor_and_flip(sample, seed)
        if self.min_sizes:
            spec = spec.model_copy(update={"min_size": int(rng.choice(self.min_sizes))})
        size = fitted_size(*sample.size, spec)
        if self.scale_jitter is None:
            return resize(sample, size, spec)
        return jitter_scale(sample, size, float(rng.uniform(*self.scale_jitter)), rng, spec)

    def _recolor_and_flip(self, sample: Sample, seed: int) -> Sample:
        # One state for all: `set_random_seed` gives each transform the same one, and all flips happen together.
        self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        masks = {} if sample.masks is None or not len(sample.masks) else {"masks": sample.masks}
        objects = np.arange(len(sample.labels))
        result = self.transform(image=sample.pixels, bboxes=sample.boxes, objects=objects, **masks)
        kept = np.asarray(result["objects"], np.int64)
        boxes = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
        moved = None if sample.masks is None else np.asarray(result.get("masks", sample.masks))[kept]
        return Sample(result["image"], boxes, sample.labels[kept], moved)


def safe_crop(sample: Sample, rng: np.random.Generator) -> Sample:
    """A random crop that cuts no box; of a picture without objects a random part of half its sides or more.

    After albumentations' BBoxSafeRandomCrop, which rounds its crop into the boxes and fails on one below a pixel.
    """
    (h, w), u = sample.size, rng.random(4)
    if len(sample.boxes):
        left, top = np.floor(sample.boxes[:, :2].min(0) * u[:2]).astype(int)
        right, bottom = sample.boxes[:, 2:].max(0)
        right, bottom = int(np.ceil(right + (w - right) * u[2])), int(np.ceil(bottom + (h - bottom) * u[3]))
    else:
        left, top = int(w / 2 * u[0]), int(h / 2 * u[1])
        right, bottom = w - int(w / 2 * u[2]), h - int(h / 2 * u[3])
        right, bottom = max(right, left + 1), max(bottom, top + 1)
    right, bottom = min(right, w), min(bottom, h)
    masks = None if sample.masks is None else sample.masks[:, top:bottom, left:right]
    boxes = sample.boxes - np.array([left, top, left, top], np.float32)
    return Sample(np.ascontiguousarray(sample.pixels[top:bottom, left:right]), boxes, sample.labels, masks)


def mosaic(
    first: Sample, others: Iterator[Sample], size: tuple[int, int], rng: np.random.Generator, spec: DetectorPreprocess
) -> Sample:
    """Four pictures as one of `size` (h, w): they meet in a random point, each as large as its quarter lets it be.

    After YOLOv4's (Bochkovskiy et al., arXiv 2004.10934), but no picture is cut, so that every box stays whole; what
    is left over is gray. Not albumentations' Mosaic, which has no masks of single objects.
    """
    h, w = size
    y, x = (round(side * share) for side, share in zip(size, rng.uniform(0.3, 0.7, 2), strict=True))
    pixels = np.full((h, w, 3), GRAY, np.uint8)
    parts = []
    for i, sample in enumerate(itertools.chain((first,), others)):
        below, right = divmod(i, 2)
        scale = min((h - y if below else y) / sample.size[0], (w - x if right else x) / sample.size[1])
        part = resize(sample, (max(1, int(sample.size[0] * scale)), max(1, int(sample.size[1] * scale))), spec)
        part = part[np.flatnonzero((part.boxes[:, 2:] - part.boxes[:, :2]).min(1, initial=np.inf) >= MIN_PIXELS)]
        top, left = y if below else y - part.size[0], x if right else x - part.size[1]
        rows, columns = slice(top, top + part.size[0]), slice(left, left + part.size[1])
        pixels[rows, columns] = part.pixels
        masks = None
        if part.masks is not None:
            masks = np.zeros((len(part.masks), h, w), np.uint8)
            masks[:, rows, columns] = part.masks
        parts.append((part.boxes + np.array([left, top, left, top], np.float32), part.labels, masks))
    boxes, labels, masks_of = zip(*parts, strict=True)
    masks = None if first.masks is None else np.concatenate(masks_of)
    return Sample(pixels, np.concatenate(boxes), np.concatenate(labels), masks)


def jitter_scale(
    sample: Sample, size: tuple[int, int], factor: float, rng: np.random.Generator, spec: DetectorPreprocess
) -> Sample:
    """A picture at `factor` times `size` (h, w), of which a random window no larger than `size` is left.

    What it cuts to under MIN_VISIBLE of its box, or scales to under MIN_PIXELS, or leaves no pixel of its mask, is
    no object any more.
    """
    scaled = [max(1, round(side * factor)) for side in size]
    cut = min(size[0], scaled[0]), min(size[1], scaled[1])
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(scaled, cut, strict=True))
    # The window is cut out of the picture before it is enlarged: a factor of 2 would else cost four times the memory.
    (h, w), (y, x) = sample.size, (sample.size[0] / scaled[0], sample.size[1] / scaled[1])
    window = (left * x, top * y, min((left + cut[1]) * x, w), min((top + cut[0]) * y, h))
    moved = resize(sample, cut, spec, window)
    sides = moved.boxes[:, 2:] - moved.boxes[:, :2]
    before = (sample.boxes[:, 2:] - sample.boxes[:, :2]) / np.array([x, y], np.float32)
    kept = (sides.min(1, initial=np.inf) >= MIN_PIXELS) & (sides.prod(1) >= MIN_VISIBLE * before.prod(1))
    if moved.masks is not None:
        kept &= moved.masks.any((1, 2))
    return moved[np.flatnonzero(kept)]


def resize(sample: Sample, size: tuple[int, int], spec: DetectorPreprocess, window: Window | None = None) -> Sample:
    """A picture, or the `window` (left, top, right, bottom) of it, at `size` (h, w), as `detector_pixels` resizes."""
    left, top, right, bottom = window or (0, 0, sample.size[1], sample.size[0])
    h, w = size
    image = Image.fromarray(sample.pixels).resize((w, h), resampling(spec.interpolation), (left, top, right, bottom))
    scale = np.array([w / (right - left), h / (bottom - top)] * 2, np.float32)
    boxes = (sample.boxes - np.array([left, top, left, top], np.float32)) * scale
    masks = None
    if sample.masks is not None:
        masks = np.zeros((len(sample.masks), h, w), np.uint8)
        for after, before in zip(masks, sample.masks, strict=True):
            nearest = Image.fromarray(before).resize((w, h), Image.Resampling.NEAREST, (left, top, right, bottom))
            after[:] = np.asarray(nearest)
    return Sample(np.asarray(image), boxes.clip(0, np.array([w, h, w, h], np.float32)), sample.labels, masks)
