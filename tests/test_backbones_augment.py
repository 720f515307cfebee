from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG

from backbones.augment import TrainAugment, randaugment
from backbones.imagenet import ImageNet, create_loader
from backbones.mix import Mix
from backbones.preprocess import ClassifierPreprocess
from backbones.samples import Sample

ALL = {"vertical_flip": 0.5, "color_jitter": 0.2, "magnitude": 9, "random_erasing": 0.5}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((60, 50), Image.Resampling.BICUBIC))


def test_augmentation_depends_on_seed_epoch_and_index_alone(pixels):
    one, other = (TrainAugment(32, seed=1, **ALL) for _ in range(2))
    other(pixels, 5)
    np.testing.assert_array_equal(one(pixels, 3), other(pixels, 3))
    assert one(pixels, 3).shape == (32, 32, 3)
    assert (one(pixels, 3) != one(pixels, 4)).any()
    first = one(pixels, 3)
    one.epoch = 1
    assert (one(pixels, 3) != first).any()
    assert (TrainAugment(32, seed=2, **ALL)(pixels, 3) != first).any()


def test_augmentation_is_the_same_for_any_number_of_workers(pixels, tmp_path):
    samples = []
    for i in range(6):
        Image.fromarray(np.roll(pixels, i, axis=1)).save(tmp_path / f"{i}.png")
        samples.append(Sample(str(tmp_path / f"{i}.png"), 0, Path(tmp_path / f"{i}.png")))
    dataset = ImageNet(samples, ClassifierPreprocess(resize=32, crop=32), TrainAugment(32, seed=0, **ALL))
    batches = [torch.cat([images for images, _ in create_loader(dataset, 2, workers)]) for workers in (0, 1, 2)]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])


def test_transforms_are_drawn_independently():
    rows, columns = np.mgrid[0:40, 0:40].astype(np.uint8) * 6
    ramps = np.stack([columns, rows, rows], axis=2)  # red falls to the right where flipped, green downwards
    augment = TrainAugment(40, seed=0, vertical_flip=0.5)

    def flips(index: int) -> tuple[bool, bool]:
        drawn = augment(ramps, index).astype(int)
        return bool(drawn[0, -1, 0] < drawn[0, 0, 0]), bool(drawn[-1, 0, 1] < drawn[0, 0, 1])

    counts = Counter(flips(index) for index in range(200))
    assert len(counts) == 4
    assert min(counts.values()) >= 30


def test_nothing_is_left_when_all_is_off(pixels):
    augment = TrainAugment(50, seed=0, min_scale=1.0, horizontal_flip=0.0)
    square = pixels[:, :50]
    # A crop of the whole area may still be of another aspect; where it is not, it is the image itself.
    assert any((augment(square, index) == square).all() for index in range(20))


def test_randaugment_grows_with_its_magnitude(pixels):
    def change(magnitude: int, operation: int) -> float:
        transform = randaugment(magnitude).transforms[operation]
        transform.p = 1.0
        transform.set_random_seed(0)
        results = [transform(image=pixels)["image"] for _ in range(40)]
        assert all(result.shape == pixels.shape and result.dtype == np.uint8 for result in results)
        return float(np.mean([np.abs(result.astype(int) - pixels).mean() for result in results]))

    graded = range(11)  # rotation ... solarise; auto-contrast, equalise and invert have one strength
    assert len(randaugment(5).transforms) == 14
    for operation in graded:
        assert change(1, operation) < change(5, operation) < change(10, operation)


def test_randaugments_operations_come_in_any_order(pixels):
    """And posterise leaves as many bits as timm's."""
    transform = randaugment(9)
    transform.set_random_seed(0)
    pairs = [transform._get_idx() for _ in range(100)]
    assert 20 < sum(first > second for first, second in pairs) < 80
    bits = [
        next(t for t in randaugment(m).transforms if type(t).__name__ == "Posterize").num_bits for m in (1, 5, 9, 10)
    ]
    arguments = [LEVEL_TO_ARG["PosterizeIncreasing"](m, {})[0] for m in (1, 5, 9, 10)]
    assert bits == [(max(1, argument),) * 2 for argument in arguments]


def test_random_erasing_erases_as_often_as_it_is_told(pixels):
    plain = TrainAugment(32, seed=0)
    for probability, lowest, highest in ((1.0, 40, 40), (0.25, 3, 19)):
        erasing = TrainAugment(32, seed=0, random_erasing=probability)
        assert lowest <= sum((erasing(pixels, i) != plain(pixels, i)).any() for i in range(40)) <= highest


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_sum_to_one_and_follow_the_pixels(mixup, cutmix):
    mix = Mix(mixup, cutmix, num_classes=5)
    labels = torch.arange(4)
    images = labels[:, None, None, None].expand(4, 3, 16, 16).float()  # each pixel is its label
    for _ in range(20):
        mixed, soft = mix(images, labels)
        assert mixed.shape == images.shape
        torch.testing.assert_close(soft.sum(1), torch.ones(4))
        torch.testing.assert_close((soft * torch.arange(5)).sum(1), mixed.mean((1, 2, 3)))


def test_one_of_mixup_and_cutmix_at_random():
    mix = Mix(0.8, 1.0, num_classes=2)
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 16, 16)
    blends = [mix(images, torch.arange(2))[0] for _ in range(30)]
    pasted = sum(set(blend.unique().tolist()) <= {0.0, 1.0} for blend in blends)
    assert 5 < pasted < 25
