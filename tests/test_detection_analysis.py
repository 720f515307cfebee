import numpy as np
import pytest
from detection_sets import annotations, detection, random_set, write
from shared_data import real

from detection.analysis import KINDS, analyse
from detection.coco import load_annotations
from detection.coco_eval import evaluate, read_results
from detection.matching import NONE, match, scenes

CAR, TRAIN = 3, 7
BOX, FAR = [10, 10, 40, 40], [60, 60, 30, 30]
NEAR = [10, 30, 40, 40]  # IoU 1/3 with BOX
RIGHT = detection(2, CAR, FAR, 0.8)
OBJECTS = [(1, CAR, BOX), (2, CAR, FAR), (3, TRAIN, FAR)]

# Of the car at BOX on image 1, which is found or not; the other two are found. Detections, kind, AP50 before and after.
ALONE = [
    # A train in the car's place, after the real one: nobody else finds the car, and the train's AP stays 1.
    ("classification", [detection(1, TRAIN, BOX, 0.7)], 0.5 * (51 / 101) + 0.5, 1.0),
    ("localisation", [detection(1, CAR, NEAR, 0.9)], 0.5 * (51 / 101 * 0.5) + 0.5, 1.0),
    ("missed", [], 0.5 * (51 / 101) + 0.5, 1.0),
    # The car is found at 0.7, after what is wrong at 0.9 or 0.75.
    ("both", [detection(1, TRAIN, NEAR, 0.9), detection(1, CAR, BOX, 0.7)], 0.5 + 0.5 * 0.5, 1.0),
    ("duplicate", [detection(1, CAR, BOX, 0.76), detection(1, CAR, BOX, 0.75)], 1.0, 1.0),
    ("background", [detection(1, CAR, [80, 0, 20, 20], 0.9), detection(1, CAR, BOX, 0.7)], 0.5 * (2 / 3) + 0.5, 1.0),
]


@pytest.mark.parametrize(("kind", "rows", "before", "after"), ALONE)
def test_each_kind_alone(kind, rows, before, after):
    found = analyse(annotations(OBJECTS), [*rows, RIGHT, detection(3, TRAIN, FAR, 0.8)]).kinds
    assert found["AP50"] == pytest.approx(before)
    assert set(found["kinds"]) == set(KINDS)
    for name, row in found["kinds"].items():
        assert row["count"] == (name == kind), name
        assert row["dAP50"] == pytest.approx(after - before if name == kind else 0), name


def test_a_duplicate_before_another_object_costs():
    rows = [detection(1, CAR, BOX, 0.9), detection(1, CAR, BOX, 0.85), RIGHT, detection(3, TRAIN, FAR, 0.8)]
    found = analyse(annotations(OBJECTS), rows).kinds
    before = 0.5 * (51 + 50 * 2 / 3) / 101 + 0.5
    assert found["AP50"] == pytest.approx(before)
    assert found["kinds"]["duplicate"] == {"count": 1, "dAP50": pytest.approx(1 - before)}


def test_the_best_of_a_kind_is_repaired_and_the_others_left_out():
    rows = [detection(1, CAR, NEAR, 0.9), detection(1, CAR, [10, 0, 40, 40], 0.3), RIGHT]
    found = analyse(annotations(OBJECTS[:2], ("car",)), rows).kinds["kinds"]
    assert found["localisation"]["count"] == 1  # the second has IoU 0.6: it finds the car
    rows[1] = detection(1, CAR, [10, 31, 40, 40], 0.3)
    found = analyse(annotations(OBJECTS[:2], ("car",)), rows).kinds
    assert found["AP50"] == pytest.approx(51 / 101 * 0.5)
    assert found["kinds"]["localisation"] == {"count": 2, "dAP50": pytest.approx(1 - 51 / 101 * 0.5)}
    assert found["kinds"]["missed"]["count"] == 0  # a localisation error is about it


def test_nothing_to_find_and_nothing_found():
    kinds = analyse(annotations(OBJECTS), [])
    assert kinds.kinds["AP50"] == 0
    assert kinds.kinds["kinds"]["missed"] == {"count": 3, "dAP50": 1.0}
    assert (kinds.threshold, kinds.f1) == (0, 0)
    assert kinds.confusion.tolist() == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]
    empty = analyse(annotations([]), [RIGHT])
    assert empty.kinds["AP50"] == -1
    assert empty.confusion.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert not empty.curves


@pytest.mark.parametrize("seed", range(6))
def test_ap50_is_cocos_and_every_detection_has_one_kind(tmp_path, seed):
    content, results = random_set(seed)
    path = write(tmp_path / "truth.json", content)
    expected = evaluate(path, results)
    found = analyse(load_annotations(path), results)
    assert found.kinds["AP50"] == pytest.approx(expected["AP50"], abs=1e-12)
    assert {name: curve.mean() for name, curve in found.curves.items()} == pytest.approx(
        {name: row["AP50"] for name, row in expected["per_class"].items()}, abs=1e-12
    )
    matches = found.matches
    wrong = (matches.truth == NONE) & ~matches.ignored
    counts = {name: row["count"] for name, row in found.kinds["kinds"].items()}
    assert sum(counts.values()) - counts["missed"] == wrong.sum()
    assert matches.ignored.any()
    # Every kind repaired leaves the AP50 as it was or better, but for the steps between 101 recalls.
    assert all(row["dAP50"] > -0.01 for row in found.kinds["kinds"].values())


@pytest.mark.parametrize("seed", range(3))
def test_confusion_counts_every_object_once_at_the_best_f1(seed):
    content, results = random_set(seed)
    found = analyse(content, results)
    given, matches = found.scenes, found.matches
    objects = np.bincount(given.truth_labels[~given.crowd], minlength=4)
    np.testing.assert_array_equal(found.confusion[:-1].sum(axis=1), objects)
    shown = (given.scores >= found.threshold) & ~matches.ignored
    np.testing.assert_array_equal(found.confusion[:, :-1].sum(axis=0), np.bincount(given.labels[shown], minlength=4))

    def f1(threshold: float) -> float:
        kept = (given.scores >= threshold) & ~matches.ignored
        return 2 * (kept & (matches.truth != NONE)).sum() / (kept.sum() + objects.sum())

    assert found.f1 == pytest.approx(max(f1(score) for score in given.scores))
    assert found.f1 == pytest.approx(f1(found.threshold))
    assert found.confusion.trace() == (shown & (matches.truth != NONE)).sum()


def test_confusion_by_hand():
    rows = [
        detection(1, TRAIN, BOX, 0.9), detection(2, CAR, FAR, 0.8), detection(3, TRAIN, FAR, 0.7),
        detection(3, CAR, FAR, 0.7), detection(3, CAR, BOX, 0.01),
    ]  # fmt: skip
    found = analyse(annotations(OBJECTS), rows)
    assert found.threshold == 0.7
    # Rows car, train, background; columns car, train, missed.
    assert found.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert found.errors.tolist() == [1, 0, 1]


def test_of_equal_overlaps_pycocotools_takes_the_last():
    content = annotations([(1, CAR, BOX), (1, CAR, BOX)], ("car",))
    given = scenes(content, [detection(1, CAR, BOX, 0.9)])
    assert match(given).truth.tolist() == [1]


def test_the_oracles_ap50():
    root = real("coco_oracle")
    truth = load_annotations(root / "instances_gt.json")
    found = analyse(truth, read_results(root / "detections.json"))
    assert found.kinds["AP50"] == pytest.approx(0.69697, abs=1e-5)
    # As the toolbox of the paper's authors, tidecv 1.0.1, counts them.
    counts = {name: row["count"] for name, row in found.kinds["kinds"].items()}
    assert counts == {
        "classification": 83, "localisation": 1, "both": 0, "duplicate": 1, "background": 0, "missed": 97,
    }  # fmt: skip
