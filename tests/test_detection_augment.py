"""Boxes and masks stay on their objects: scenes of coloured rectangles, compared with coordinates moved by hand."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from backbones.preprocess import DetectorPreprocess, fitted_size
from detection.augment import (
    MIN_PIXELS,
    MIN_VISIBLE,
    DetectionAugment,
    Sample,
    jitter_scale,
    mosaic,
    resize,
    safe_crop,
)

SPEC = DetectorPreprocess(min_size=120, max_size=200, divisor=32)
COLORS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)], np.uint8)


def scene(rng: np.random.Generator, first_label: int = 1, most: int = 3) -> Sample:
    """Up to `most` rectangles side by side on black, label i in color i - 1; the masks are the rectangles."""
    h, w, count = int(rng.integers(60, 160)), int(rng.integers(60, 160)), int(rng.integers(1, most + 1))
    pixels, masks, boxes = np.zeros((h, w, 3), np.uint8), np.zeros((count, h, w), np.uint8), []
    for i in range(count):
        left = i * w // count + int(rng.integers(0, 6))
        right = (i + 1) * w // count - int(rng.integers(0, 6))
        top, bottom = int(rng.integers(0, h // 3)), int(rng.integers(2 * h // 3, h + 1))
        pixels[top:bottom, left:right] = COLORS[first_label + i - 1]
        masks[i, top:bottom, left:right] = 1
        boxes.append((left, top, right, bottom))
    return Sample(pixels, np.array(boxes, np.float32), np.arange(first_label, first_label + count), masks)


def extent(flags: np.ndarray) -> list[float]:
    ys, xs = np.nonzero(flags)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def check_on_their_objects(sample: Sample, atol: float = 1.01) -> None:
    """Each box is the extent of its color, to the pixel that a resize blurs, and so is its mask."""
    assert sample.masks is not None
    assert len(sample.boxes) == len(sample.labels) == len(sample.masks)
    assert sample.masks.shape[1:] == sample.size
    for box, label, mask in zip(sample.boxes, sample.labels, sample.masks, strict=True):
        colored = np.abs(sample.pixels.astype(int) - COLORS[label - 1]).max(2) < 100
        np.testing.assert_allclose(box, extent(colored), atol=atol)
        np.testing.assert_allclose(box, extent(mask), atol=atol)
        assert (colored != mask.astype(bool)).sum() <= colored.shape[0] + colored.shape[1] + 2 * extent(mask)[3]


def apply(augment: DetectionAugment, scenes: list[Sample], index: int) -> Sample:
    return augment(index, len(scenes), scenes.__getitem__, SPEC)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_a_flip_is_the_mirrored_coordinates(axis):
    augment = DetectionAugment(float(axis == "x"), float(axis == "y"), seed=1)
    for index in range(10):
        sample = scene(np.random.default_rng(index))
        h, w = sample.size
        x1, y1, x2, y2 = sample.boxes.T
        flipped = (w - x2, y1, w - x1, y2) if axis == "x" else (x1, h - y2, x2, h - y1)
        fh, fw = fitted_size(h, w, SPEC)
        found = apply(augment, [sample] * 11, index)
        np.testing.assert_allclose(found.boxes, np.stack(flipped, 1) * [fw / w, fh / h, fw / w, fh / h], rtol=1e-5)
        order = np.argsort(found.labels)
        np.testing.assert_array_equal(found.labels[order], sample.labels)
        check_on_their_objects(found)


def test_flips_crops_and_mosaics_are_drawn_by_themselves():
    augment = DetectionAugment(0.5, 0.5, seed=0)
    pixels = np.zeros((120, 120, 3), np.uint8)
    pixels[:40, :40] = 255
    corner = Sample(pixels, np.array([[0, 0, 40, 40]], np.float32), np.array([1]))
    corners = [tuple(apply(augment, [corner] * 99, index).boxes[0, :2]) for index in range(80)]
    assert len(set(corners)) == 4
    assert min(corners.count(corner) for corner in set(corners)) > 8


def test_a_crop_keeps_every_box_whole():
    offsets = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sample = scene(rng)
        h, w = sample.size
        where = np.stack((*np.indices((h, w)), np.zeros((h, w))), 2).astype(np.uint8)  # a pixel says where it was
        crop = safe_crop(Sample(where, sample.boxes, sample.labels, sample.masks), rng)
        top, left = (int(value) for value in crop.pixels[0, 0, :2])
        np.testing.assert_array_equal(crop.boxes, sample.boxes - [left, top, left, top])
        assert crop.masks is not None
        assert crop.masks.sum() == sample.masks.sum()
        assert crop.boxes.min() >= 0
        assert (crop.boxes[:, 2:].max(0) <= crop.size[::-1]).all()
        offsets.add((top, left, crop.size))
        thin = Sample(where, np.array([[10.2, 10.2, 10.6, 10.6]], np.float32), np.array([1]))
        crop = safe_crop(thin, rng)
        assert min(crop.size) >= 1
        np.testing.assert_allclose(crop.boxes[0, 2:] - crop.boxes[0, :2], 0.4, atol=1e-5)
        nothing = safe_crop(Sample(where[:1, :1], np.zeros((0, 4), np.float32), np.zeros(0, np.int64)), rng)
        assert nothing.size == (1, 1)
    assert len(offsets) > 30


@pytest.mark.parametrize("factor", [0.1, 0.4, 1.0, 1.7, 3.0])
def test_scale_jitter_is_the_scaled_and_shifted_coordinates(factor):
    for seed in range(12):
        sample = scene(np.random.default_rng(seed))
        size = fitted_size(*sample.size, SPEC)
        found = jitter_scale(sample, size, factor, np.random.default_rng(seed), SPEC)
        scaled = np.maximum(1, np.round(np.array(size) * factor)).astype(int)
        assert found.size == tuple(np.minimum(scaled, size))
        rng = np.random.default_rng(seed)
        top, left = (rng.integers(a - b + 1) for a, b in zip(scaled, found.size, strict=True))
        ratio = scaled / sample.size
        whole = sample.boxes * np.tile(ratio[::-1], 2)
        moved = whole - [left, top, left, top]
        clipped = moved.clip(0, np.tile(found.size[::-1], 2))
        sides = clipped[:, 2:] - clipped[:, :2]
        share = sides.prod(1) / (moved[:, 2:] - moved[:, :2]).prod(1)
        kept = (sides.min(1) >= MIN_PIXELS) & (share >= MIN_VISIBLE)
        np.testing.assert_allclose(found.boxes, clipped[kept], atol=1e-3)
        np.testing.assert_array_equal(found.labels, sample.labels[kept])
        if factor > 0.2:  # below, a rectangle is hardly more than what the resize blurs
            check_on_their_objects(found)


def test_a_mosaic_holds_four_whole_pictures():
    sizes = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scenes = [scene(rng, first_label=i + 1, most=1) for i in range(4)]
        size = fitted_size(*scenes[0].size, SPEC)
        found = mosaic(scenes[0], iter(scenes[1:]), size, rng, SPEC)
        assert found.size == size
        assert found.labels.tolist() == [1, 2, 3, 4]
        check_on_their_objects(found)
        for box, before in zip(found.boxes, scenes, strict=True):  # whole: of the aspect that it had
            aspects = [(b[2] - b[0]) / (b[3] - b[1]) for b in (box, before.boxes[0])]
            assert aspects[0] == pytest.approx(aspects[1], rel=0.06)
        sizes.add(tuple(np.round(found.boxes[0])))
    assert len(sizes) > 15


def others(scenes: list[Sample], first: int) -> Callable[[int], Sample]:
    """Gives the scenes in turn, whichever is asked for, so that a mosaic has no color twice."""
    turn = itertools.count(first)
    return lambda _: scenes[next(turn) % len(scenes)]


SETTINGS: dict[str, Any] = {
    "flips and crop": {"horizontal_flip": 0.5, "vertical_flip": 0.5, "random_crop": 0.7},
    "large-scale jitter": {"horizontal_flip": 0.5, "scale_jitter": (0.4, 2.0)},
    "sizes": {"min_sizes": (64, 96, 128), "random_crop": 0.5},
    "mosaic": {"mosaic": 0.7, "horizontal_flip": 0.5, "scale_jitter": (0.7, 1.5)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_boxes_and_masks_follow_their_objects_through_everything(name):
    rng = np.random.default_rng(5)
    scenes = [scene(rng, first_label=i + 1, most=1) for i in range(6)]
    augment = DetectionAugment(seed=3, **SETTINGS[name])
    sizes, objects = set(), 0
    for epoch, index in itertools.product(range(6), range(6)):
        augment.epoch = epoch
        found, again = (augment(index, 6, others(scenes, index), SPEC) for _ in range(2))
        limit = SPEC.min_size if name != "sizes" else max(SETTINGS[name]["min_sizes"])
        assert min(found.size) <= limit
        assert max(found.size) <= SPEC.max_size
        check_on_their_objects(found, atol=1.3 if name == "mosaic" else 1.01)  # that resizes twice
        objects += len(found.labels)
        sizes.add(found.size)
        np.testing.assert_array_equal(again.pixels, found.pixels)
        np.testing.assert_array_equal(again.boxes, found.boxes)
    assert objects >= 30
    assert len(sizes) > 2


def test_nothing_asked_for_is_the_evaluations_pixels():
    sample = scene(np.random.default_rng(0))
    found = apply(DetectionAugment(seed=0), [sample], 0)
    np.testing.assert_array_equal(found.pixels, resize(sample, fitted_size(*sample.size, SPEC), SPEC).pixels)


def test_no_boxes_and_boxes_at_the_edge():
    settings = {"horizontal_flip": 0.5, "vertical_flip": 0.5, "color_jitter": 0.2, "random_crop": 0.5, "mosaic": 0.5}
    augment = DetectionAugment(**settings, scale_jitter=(0.2, 2.0), seed=0)
    pixels = np.zeros((48, 64, 3), np.uint8)
    empty = Sample(pixels, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 48, 64), np.uint8))
    edge = Sample(pixels, np.array([[0, 0, 64.00001, 48]], np.float32), np.array([1]), np.ones((1, 48, 64), np.uint8))
    line = Sample(pixels[:1], np.array([[0, 0, 64, 1]], np.float32), np.array([1]), np.ones((1, 1, 64), np.uint8))
    for index in range(20):
        found = apply(augment, [empty] * 20, index)
        assert found.boxes.shape == (0, 4)
        assert found.masks is not None
        assert found.masks.shape == (0, *found.size)
        for sample in (edge, line):
            found = apply(augment, [sample] * 20, index)
            assert (found.boxes[:, 2:] <= found.size[::-1]).all()
    plain = DetectionAugment(0.5, 0.5, 0.2, 0.5, seed=0)
    assert all(len(apply(plain, [edge] * 9, index).boxes) == 1 for index in range(9))
