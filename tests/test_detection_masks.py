"""Masks against pycocotools' own way, and against shapes whose pixels are known."""

import json
from array import array

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from shared_data import real
from torchvision.models.detection.roi_heads import paste_masks_in_image

from backbones.errors import InputError
from detection.masks import PastedMasks, _run_lengths, are_whole, decode, encode, is_usable, paste


def test_polygons_and_run_lengths_are_the_pixels_they_describe():
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 10:25] = 1
    rectangle = [10, 5, 25, 5, 25, 15, 10, 15]
    np.testing.assert_array_equal(decode([rectangle], 20, 30), mask)
    np.testing.assert_array_equal(decode([array("d", rectangle)], 20, 30), mask)
    mask[0:3, 0:4] = 1
    two = [rectangle, [0, 0, 4, 0, 4, 3, 0, 3]]
    np.testing.assert_array_equal(decode(two, 20, 30), mask)
    np.testing.assert_array_equal(decode([*two, [1, 2, 3], [4, 4, 9, 9], []], 20, 30), mask)  # those are no polygons
    column_by_column = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(column_by_column, prepend=0, append=column_by_column[-1])).tolist()
    counts = np.diff([0, *changes, mask.size]).tolist()
    np.testing.assert_array_equal(decode({"size": [20, 30], "counts": counts}, 20, 30), mask)
    (run,) = encode([mask])
    assert json.loads(json.dumps(run)) == run
    np.testing.assert_array_equal(decode(run, 20, 30), mask)
    np.testing.assert_array_equal(decode({**run, "counts": run["counts"].encode()}, 20, 30), mask)


def test_any_masks_survive_their_encoding():
    masks = np.random.default_rng(0).random((7, 33, 21)) < np.linspace(0, 1, 7)[:, None, None]
    found = np.stack([decode(run, 33, 21) for run in encode(masks.astype(np.uint8))])
    np.testing.assert_array_equal(found, masks)
    assert encode([]) == []


def test_run_lengths_as_text_are_those_that_pycocotools_wrote():
    rng = np.random.default_rng(0)
    for _ in range(200):
        h, w = (int(side) for side in rng.integers(1, 300, 2))
        counts = np.diff(np.unique(np.r_[0, rng.integers(0, h * w, rng.integers(0, 40)), h * w])).tolist()
        counts = [0, *counts] if rng.random() < 0.5 else counts
        text = rle.frPyObjects({"size": [h, w], "counts": counts}, h, w)["counts"]
        found = _run_lengths(text)
        assert found is not None
        assert found.tolist() == counts
        assert are_whole(text.decode(), h, w)
        assert not are_whole(text, h, w + 1)
        assert not are_whole(text[:-1], h, w)


def test_real_masks_are_those_of_pycocotools():
    path = real("coco_ccby") / "instances_val.json"
    coco = COCO(str(path))
    compared = 0
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        found = decode(annotation["segmentation"], image["height"], image["width"])
        np.testing.assert_array_equal(found, coco.annToMask(annotation))
        compared += annotation["iscrowd"]
    assert compared > 0


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "no polygon"),
        ([[1, 2, 3, 4, 5]], "no polygon"),
        ([[1, 2, 3, 4, 5, float("nan")]], "no polygon"),
        ([[1, 2, 3, 4, 5, 10**400]], "no polygon"),
        ([[1, 2, 3, 4, 5, 1e12]], "no polygon"),  # pycocotools would walk there
        ({"size": [30, 20], "counts": [600]}, "not of 30x20 pixels"),
        ({"size": [20.0, 30], "counts": [600]}, "not of 30x20 pixels"),
        ({"size": [20, 30]}, "not of 30x20 pixels"),
        *[
            ({"size": [20, 30], "counts": counts}, "run lengths that are broken")
            for counts in (
                [5, 5], [-5, 605], [5, 1000000], [300.0, 300], [True, 599], [], None, "", "é", "\0", "abc",
                "0000",  # four times nothing: pycocotools would give memory as it is
                "oooo",  # no last number: it would read on
                "N0",  # -2
                "o" * 20 + "0",  # larger than 64 bits
            )
        ],
    ],
)  # fmt: skip
def test_a_broken_segmentation_is_an_error(segmentation, message):
    with pytest.raises(InputError, match=message):
        decode(segmentation, 20, 30)
    assert not is_usable(segmentation, (20, 30))


def test_what_is_usable_without_the_images_size():
    assert not is_usable(None, None)
    assert is_usable({"size": [20, 30], "counts": [600]}, None)
    assert not is_usable({"size": [20, 30], "counts": [601]}, None)
    assert not is_usable({"size": [-20, -30], "counts": [600]}, None)
    assert not is_usable({"size": [10**6, 10**6], "counts": [10**12]}, None)  # more than pycocotools counts


def smooth(count: int) -> torch.Tensor:
    """Masks as networks give them, [count, 1, 28, 28] with values between 0 and 1."""
    coarse = torch.randn((count, 1, 7, 7), generator=torch.Generator().manual_seed(0)) * 3
    return torch.nn.functional.interpolate(coarse, (28, 28), mode="bicubic").sigmoid()


def pasted(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    return np.stack([paste(grid, box, size) for grid, box in zip(masks[:, 0].numpy(), boxes.numpy(), strict=True)])


def test_pasting_is_torchvisions_at_one_half():
    masks = torch.rand((6, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(
        [[2.0, 3, 20, 30], [0, 0, 60, 40], [-5, -5, 10, 12], [50, 30, 80, 70], [7.2, 7.4, 7.9, 7.8], [90, 9, 95, 20]]
    )
    found = pasted(masks, boxes, (40, 60))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, paste_masks_in_image(masks, boxes, (40, 60))[:, 0] > 0.5)
    assert found.any(axis=(1, 2)).tolist() == [True] * 4 + [found[4].any(), False]
    whole = paste(np.ones((28, 28), np.float32), np.array([10, 5, 25, 15], np.float32), (20, 30))
    ys, xs = whole.nonzero()
    np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [10, 5, 25, 15], atol=1)


def test_pasting_is_torchvisions_for_boxes_of_any_size():
    """All pixels alike, unless torchvision's own value is within rounding of one half."""
    rng, (h, w), count = np.random.default_rng(0), (240, 320), 100
    centres, sides = rng.random((count, 2)) * (w, h), np.exp(rng.uniform(0, np.log(2 * w), (count, 2)))
    boxes = torch.from_numpy(np.concatenate((centres - sides / 2, centres + sides / 2), 1).astype(np.float32))
    masks = smooth(count)
    expected = paste_masks_in_image(masks, boxes, (h, w))[:, 0].numpy()
    found = pasted(masks, boxes, (h, w))
    assert found.sum() > 1e5
    assert (np.abs(expected[found != (expected > 0.5)] - 0.5) < 1e-6).all()
    runs = PastedMasks(masks[:, 0].numpy(), boxes.numpy(), (h, w))
    assert list(runs) == encode(found)
    assert runs[7] == encode(found[7:8])[0]
    assert list(PastedMasks(masks[:0, 0].numpy(), boxes[:0].numpy(), (h, w))) == []
