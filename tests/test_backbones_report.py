import csv
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from backbones.metrics import calibrate
from backbones.report import Outcomes, confused_pairs, confusion, worst, write_report

FILES = {"per_class.csv", "predictions.csv", "confusion.png", "reliability.png", "mistakes.jpg"}


def outcomes(count: int, classes: int, present: int) -> Outcomes:
    """`count` images of the first `present` classes; every third is wrong, the later the surer."""
    targets = np.arange(count) % present
    best = np.where(np.arange(count) % 3 == 0, (targets + 1) % classes, targets)
    ranked = np.stack([best, (best + 1) % classes], axis=1)
    sure = np.linspace(0.1, 0.9, count, dtype=np.float32)
    names = [f"${i}$, a class" for i in range(classes)]  # neither mathematics nor two columns
    return Outcomes([f"{i}.jpg" for i in range(count)], np.arange(count) * 2, targets, ranked, sure, names)


def write(folder: Path, given: Outcomes, asked: list[int] | None = None) -> dict[str, bytes]:
    def pixels(index: int) -> np.ndarray:
        if asked is not None:
            asked.append(index)
        return np.full((20, 20, 3), index % 256, dtype=np.uint8)

    calibration = calibrate(given.confidence, given.ranked[:, 0] == given.targets)
    write_report(folder, given, {given.classes[0]: {"images": 2, "top1": 0.5, "top5": 1.0}}, calibration, pixels)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_tables_say_what_was_predicted(tmp_path):
    assert set(write(tmp_path, outcomes(7, classes=4, present=3))) == FILES
    table = rows(tmp_path / "predictions.csv")
    assert [row["file"] for row in table] == [f"{i}.jpg" for i in range(7)]
    assert list(table[3].values()) == ["3.jpg", "$0$, a class", "$1$, a class", "$2$, a class", "0.500000"]
    assert rows(tmp_path / "per_class.csv") == [{"class": "$0$, a class", "images": "2", "top1": "0.5", "top5": "1.0"}]


@pytest.mark.parametrize(("classes", "present"), [(3, 3), (1000, 10), (1000, 60)])
def test_pictures_are_the_same_whatever_the_users_settings(tmp_path, classes, present):
    given = outcomes(120, classes, present)
    first = write(tmp_path / "a", given)
    with matplotlib.rc_context({"figure.facecolor": "red", "font.size": 30}):
        assert write(tmp_path / "b", given) == first
    for name in ("confusion.png", "reliability.png", "mistakes.jpg"):
        with Image.open(tmp_path / "a" / name) as image:
            assert min(image.size) >= 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_a_confusion_matrixs_cells_are_counts_of_truth_and_prediction():
    targets, best = np.array([1, 1, 1, 1, 4, 4, 4, 6]), np.array([1, 1, 4, 0, 4, 6, 6, 6])
    names = [f"c{i}" for i in range(8)]
    ranked, sure = np.stack([best, best + 1], axis=1), np.ones(8, dtype=np.float32)
    figure = confusion(Outcomes([""] * 8, np.arange(8), targets, ranked, sure, names))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c1", "c4", "c6"]
    assert [label.get_text() for label in axes.get_xticklabels()][:3] == ["c1", "c4", "c6"]
    counts = np.array([[2, 1, 0, 1], [0, 1, 2, 0], [0, 0, 1, 0]])  # the last column: a class without images
    np.testing.assert_allclose(axes.images[0].get_array(), counts / counts.sum(1, keepdims=True))
    cells = {(int(text.get_position()[1]), int(text.get_position()[0])): int(text.get_text()) for text in axes.texts}
    assert cells == {(row, column): counts[row, column] for row, column in np.argwhere(counts).tolist()}


def test_worst_mistakes_are_the_surest_and_pairs_are_counted(tmp_path):
    given = outcomes(9, classes=3, present=3)
    assert worst(given, 2).tolist() == [6, 3]
    assert confused_pairs(given) == [(3, 0, 1)]
    asked: list[int] = []
    write(tmp_path, given, asked)
    assert asked == [12, 6, 0]  # positions in the data set, not among those that were seen


def test_without_mistakes_there_is_nothing_left_of_an_earlier_report(tmp_path):
    given = outcomes(3, classes=60, present=3)
    given = Outcomes(given.files, given.indices, given.ranked[:, 0], given.ranked, given.confidence, given.classes)
    (tmp_path / "mistakes.jpg").write_bytes(b"an earlier one")
    assert write(tmp_path, given)["mistakes.jpg"].startswith(b"\xff\xd8")
    assert not confused_pairs(given)
