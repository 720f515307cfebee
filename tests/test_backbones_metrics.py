import numpy as np
import pytest

from backbones.errors import InputError
from backbones.metrics import Accuracy, calibrate, confidence, rank, real_accuracy


def test_accuracy_by_hand():
    logits = np.array([[0.9, 0.5, 0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.0] * 6])
    accuracy = Accuracy(list("abcdef"))
    accuracy.update(rank(logits[:2], 5), np.array([0, 0]))
    accuracy.update(rank(logits[2:], 5), np.array([1]))
    assert accuracy.compute() == {
        "top1": 1 / 3,
        "top5": 2 / 3,
        "images": 3,
        "per_class": {
            "a": {"images": 2, "top1": 0.5, "top5": 0.5},
            "b": {"images": 1, "top1": 0.0, "top5": 1.0},  # of equal logits the lower index is first
        },
    }


def test_ranking_is_the_stable_sorts_for_few_and_for_many_classes():
    logits = np.random.default_rng(0).integers(-3, 3, (50, 1000)).astype(np.float32)  # full of equals
    expected = np.argsort(-logits, axis=1, kind="stable")
    for k in (1, 5, 50, 51, 1000):
        np.testing.assert_array_equal(rank(logits, k), expected[:, :k])
    np.testing.assert_array_equal(rank(np.zeros((2, 3)), 5), [[0, 1, 2]] * 2)
    with pytest.raises(InputError, match="not finite"):
        rank(np.array([[np.nan, 1.0]]), 1)


def test_confidence_is_the_softmaxs_largest():
    np.testing.assert_allclose(confidence(np.log([[1.0, 3.0], [0.5, 0.5]])), [0.75, 0.5])
    np.testing.assert_allclose(confidence(np.array([[1e4, 0, -1e4]], dtype=np.float32)), [1])  # nothing overflows


def test_real_accuracy_by_hand():
    labels = [(3,), (1, 2), (), (0,)]
    assert real_accuracy(np.array([3, 2, 3, 1]), labels) == {"top1": 2 / 3, "images": 3, "without_label": 1}
    assert real_accuracy(np.array([3]), [()]) == {"top1": None, "images": 0, "without_label": 1}


def test_calibration_by_hand():
    confidences = np.array([0.2, 0.4, 0.5, 0.9, 0.8, 1.0])
    right = np.array([False, True, True, True, False, True])
    bins = calibrate(confidences, right, bins=2)  # (0, 0.5] holds the first three
    np.testing.assert_array_equal(bins.images, [3, 3])
    np.testing.assert_allclose(bins.confidence, [1.1 / 3, 0.9])
    np.testing.assert_allclose(bins.accuracy, [2 / 3, 2 / 3])
    assert bins.ece == pytest.approx(0.5 * (2 - 1.1) / 3 + 0.5 * (0.9 - 2 / 3))


def test_calibration_of_the_sure_and_right_is_perfect():
    bins = calibrate(np.ones(4, dtype=np.float32), np.ones(4, dtype=bool))
    assert bins.ece == 0
    np.testing.assert_array_equal(bins.images, [0] * 14 + [4])
