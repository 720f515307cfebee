import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from detection_sets import SIZE, annotations, detection, random_set, write
from PIL import Image

from detection.analysis import KINDS, analyse
from detection.coco import load_annotations
from detection.coco_eval import FIGURES, evaluate
from detection.report import GREEN, RED, confusion_figure, worst_images, worst_sheet, write_report

TABLES = {"figures.csv", "per_class.csv", "precision_recall.csv", "confusion.csv", "errors.csv"}
PICTURES = {"errors.png", "confusion.png", "precision_recall.png", "worst.jpg"}


@pytest.fixture
def paths(tmp_path):
    """Gray images 1…12."""
    for i in range(1, 13):
        Image.new("RGB", (SIZE, SIZE), "gray").save(tmp_path / f"{i}.png")
    return {i: tmp_path / f"{i}.png" for i in range(1, 13)}


def report(folder, content, results, paths, masks=None):
    path = write(folder.with_suffix(".json"), content)
    result, found = evaluate(path, results, masks=masks), analyse(load_annotations(path), results)
    write_report(folder, result, found, paths)
    return result, found


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


class Page(HTMLParser):
    """What a page shows and what it asks for."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_everything_as_tables_json_and_one_page(tmp_path, paths):
    content, results = random_set(1, masks=True)
    result, found = report(tmp_path / "report", content, results, paths)
    assert {path.name for path in (tmp_path / "report").iterdir()} == TABLES | PICTURES | {"report.json", "report.html"}
    figures = rows(tmp_path / "report" / "figures.csv")
    assert figures[0] == ["figure", "bbox", "segm"]
    assert [(row[0], float(row[1]), float(row[2])) for row in figures[1:]] == [
        (name, result[name], result["segm"][name]) for name in FIGURES
    ]
    classes = rows(tmp_path / "report" / "per_class.csv")
    assert classes[0] == ["class", "objects", "detections", "bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"]
    assert [row[0] for row in classes[1:]] == ["car", "train", "bus", "boat"]
    assert classes[4][3:] == [""] * 4  # no boat is there to be found
    curves = np.array(rows(tmp_path / "report" / "precision_recall.csv")[1:], dtype=float)
    assert curves.shape == (101, 4)
    assert curves[:, 1].mean() == pytest.approx(result["per_class"]["car"]["AP50"])
    assert [row[0] for row in rows(tmp_path / "report" / "errors.csv")] == ["kind", *KINDS]
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert stored["confusion"]["counts"] == found.confusion.tolist()
    assert stored["AP"] == result["AP"]

    page = Page((tmp_path / "report" / "report.html").read_text())
    assert "script" not in page.tags
    assert len(page.sources) == len(PICTURES)
    for source in page.sources:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", source).groups()
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format.lower() == kind
    assert f"{result['segm']['AP50']:.4f}" in page.text
    assert set(KINDS) <= set(page.text)


def test_the_same_findings_are_the_same_bytes_whatever_the_users_settings(tmp_path, paths):
    content, results = random_set(2)
    content["categories"][0]["name"] = "<b>$x_1$</b>, a class"
    report(tmp_path / "a", content, results, paths)
    with matplotlib.rc_context({"figure.facecolor": "red", "font.size": 30}):
        report(tmp_path / "b", content, results, paths)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    page = Page((tmp_path / "a" / "report.html").read_text())
    assert "b" not in page.tags
    assert "<b>$x_1$</b>, a class" in page.text


def test_neither_objects_nor_detections_nor_images(tmp_path, paths):
    write(tmp_path / "worst.jpg", "an earlier one")
    report(tmp_path, annotations([]), [], {})
    assert not (tmp_path / "worst.jpg").exists()
    assert len(Page((tmp_path / "report.html").read_text()).sources) == 3
    perfect = annotations([(1, 3, [10, 10, 50, 50])])
    report(tmp_path, perfect, [detection(1, 3, [10, 10, 50, 50], 0.5)], paths)
    assert (tmp_path / "worst.jpg").exists()


def test_worst_images_have_the_most_errors_and_show_them(paths):
    boxes = [(1, 3, [10, 30, 40, 40]), (3, 3, [10, 30, 40, 40]), (3, 7, [60, 50, 30, 30])]
    found = analyse(
        annotations(boxes), [detection(1, 3, [10, 30, 40, 40], 0.9), detection(1, 3, [60, 50, 30, 30], 0.9)]
    )
    assert worst_images(found) == [2, 0]  # positions, of the images 3 and 1
    sheet = np.asarray(worst_sheet(found, paths)).astype(int)

    def has(color, left) -> bool:
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        return bool((np.abs(sheet[:, left : left + 480] - (red, green, blue)).max(axis=2) == 0).any())

    # Image 3: both are missed, nothing is predicted. Image 1: the object is found, one detection is wrong.
    assert [(has(GREEN, left), has(RED, left)) for left in (0, 480, 960, 1440)] == [
        (False, True), (False, False), (True, False), (True, True),
    ]  # fmt: skip


def test_a_confusion_matrix_has_shares_of_rows_and_counts():
    content, results = random_set(3)
    found = analyse(content, results)
    axes = confusion_figure(found).axes[0]
    names = ["car", "train", "bus", "boat"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*names, "background"]
    assert [label.get_text() for label in axes.get_xticklabels()] == [*names, "missed"]
    shares = found.confusion / np.maximum(found.confusion.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(axes.images[0].get_array(), shares)
    cells = {(int(text.get_position()[1]), int(text.get_position()[0])): int(text.get_text()) for text in axes.texts}
    assert cells == {
        (row, column): found.confusion[row, column] for row, column in np.argwhere(found.confusion).tolist()
    }
