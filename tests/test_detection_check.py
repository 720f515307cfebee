"""One broken data set with a defect of every kind, each named with the id of what has it."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shared_data import real

from detection import check, check_objects, findings
from detection.__main__ import main
from detection.check import check_data
from detection.data_report import statistics

SQUARE = [10, 20, 40, 20, 40, 60, 10, 60]
NAN, INF = float("nan"), float("inf")


def broken(root: Path) -> tuple[dict[str, Any], set[tuple[str, str, Any]]]:
    """A data set's content, its image files in `root`, and the findings expected: kind, what and id."""
    images: list[Any] = [{"id": i, "file_name": f"{i}.png", "width": 120, "height": 90} for i in range(1, 11)]
    for i in (1, 3, 4, 5, 9, 10):
        Image.new("RGB", (120, 90)).save(root / f"{i}.png")
    expected: set[tuple[str, str, Any]] = {("file-missing", "image", 2)}
    images[2] |= {"width": 90, "height": 120}
    expected.add(("file-of-another-size", "image", 3))
    images[3]["width"] = -1
    expected |= {("image-size-invalid", "image", 4), ("file-of-another-size", "image", 4)}
    images[0]["width"] = 120.0  # its objects are looked at all the same
    del images[4]["width"]
    expected.add(("image-without-size", "image", 5))
    (root / "6.png").write_bytes(b"no image")
    expected.add(("file-undecodable", "image", 6))
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, size in ((7, (90, 120)), (8, (120, 90))):
        images[i - 1]["file_name"] = f"{i}.jpg"
        Image.new("RGB", size).save(root / f"{i}.jpg", exif=exif)
    expected |= {("file-turned", "image", 7), ("file-of-another-size", "image", 8)}
    images[8]["file_name"] = "1.png"
    expected.add(("file-name-twice", "image", 9))
    images += [{"id": 10, "file_name": "1.jpg", "width": 1, "height": 1}, {"id": "x", "file_name": "2.jpg"}, 7]
    images += [{"id": 11, "width": 5, "height": 5}, {"file_name": "3.jpg", "width": 5, "height": 5}]
    expected |= {("image-id-twice", "image", 10), ("image-id-invalid", "image", "x")}
    expected |= {("image-without-size", "image", "x"), ("entry-invalid", "image", "at position 12")}
    expected |= {("image-without-file-name", "image", 11), ("image-id-invalid", "image", "at position 14")}
    for side in (INF, NAN, 10**400, 0.5):
        i = 20 + len(images)
        images.append({"id": i, "file_name": f"{i}.png", "width": side, "height": 90})
        expected |= {("image-size-invalid", "image", i), ("file-missing", "image", i)}

    categories: list[Any] = [{"id": 1, "name": "person"}, {"id": 1, "name": "cat"}, {"id": 3, "name": "person"}]
    categories += [{"id": 4}, {"name": "dog"}, None]
    expected |= {("category-id-twice", "category", 1), ("category-name-twice", "category", 3)}
    expected |= {("category-without-name", "category", 4), ("category-without-objects", "category", 4)}
    expected |= {("category-id-invalid", "category", "at position 4"), ("entry-invalid", "category", "at position 5")}

    annotations: list[Any] = []

    def add(*kinds: str, **values: Any) -> None:
        number = 100 + len(annotations)
        box = [10 + len(annotations) / 100, 20, 30, 40]  # no two alike
        entry = {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": 1200, "iscrowd": 0} | values
        annotations.append({key: value for key, value in entry.items() if value is not ...})
        expected.update((kind, "annotation", entry["id"]) for kind in kinds)

    add()
    add("annotation-id-twice", id=100)
    add("key-missing", image_id=...)
    add("key-missing", category_id=...)
    add("key-missing", bbox=...)
    add("unknown-image", image_id=99)
    add("unknown-image", image_id=[1])
    add("unknown-category", category_id=2)
    add("object-twice", bbox=[10, 20, 30, 40])
    for box in ([1, 2, 3], "no", [1, 2, 3, "4"], [1, 2, 3, None], [1, 2, 3, 10**400]):
        add("box-not-four-numbers", bbox=box)
    for box in ([NAN, 2, 3, 4], [1, 2, INF, 4]):
        add("box-not-finite", bbox=box)
    for box in ([1, 2, 0, 4], [1, 2, 3, -4]):
        add("box-without-area", bbox=box, area=0)
    for box in ([121, 2, 10, 4], [-20, 2, 10, 4]):
        add("box-outside", bbox=box, area=40)
    add("box-too-thin", bbox=[1, 2, 0.05, 4], area=0)
    add("box-too-thin", bbox=[1, 2, 0.05, 4], area=0, image_id=5)
    add("box-partly-outside", bbox=[100, 2, 30, 40])
    add("box-larger-than-image", bbox=[-1, 2, 122, 40], area=122 * 40)
    for area in (-1, NAN, "large", None, 10**400):
        add("area-invalid", area=area)
    add("area-disagrees", area=600)
    add(area=600, segmentation=[[10, 20, 40, 20, 40, 60]])  # that of its triangle
    for crowd in (2, None, "0"):
        add("iscrowd-invalid", iscrowd=crowd)
    add("crowd-without-rle", iscrowd=1, segmentation=[SQUARE])
    for given in ([], {}, [[]]):
        add("segmentation-empty", segmentation=given)
    for given in ("no", 5, [SQUARE, "no"], [["a"] * 6], [[True] * 6], [[10**400] * 6]):
        add("segmentation-invalid", segmentation=given)
    add("polygon-odd", segmentation=[SQUARE[:7]])
    add("polygon-short", segmentation=[SQUARE[:4]])
    for value in (NAN, INF, 1e300):
        add("polygon-not-finite", segmentation=[[*SQUARE[:7], value]])
    add("rle-of-another-size", segmentation={"size": [120, 90], "counts": [10800]})
    for runs in ({}, {"size": [90]}, {"size": [90, 120]}, {"size": [90, 120], "counts": [5]}):
        if runs:
            add("rle-broken", segmentation=runs)
    for runs in ("oooo", "0000", "abc", [10800.0], [5, 1000000], [-5, 10805]):
        add("rle-broken", segmentation={"size": [90, 120], "counts": runs})
    for size in ([-90, -120], [90.0, 120], [10**400, 120]):
        add("rle-broken", segmentation={"size": size, "counts": [10800]})
    add("segmentation-far-from-box", segmentation=[[60, 60, 90, 60, 90, 80]])
    add(category_id=3, segmentation={"size": [90, 120], "counts": [920, 40] + [50, 40] * 29 + [7230]}, iscrowd=1)
    annotations.append("no")
    expected.add(("entry-invalid", "annotation", f"at position {len(annotations) - 1}"))
    annotations.append({"image_id": 1, "category_id": 1, "bbox": [50, 20, 30, 40]})
    expected.add(("annotation-without-id", "annotation", f"at position {len(annotations) - 1}"))
    return {"images": images, "categories": categories, "annotations": annotations}, expected


def test_every_defect_is_named_and_nothing_else(tmp_path):
    content, expected = broken(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(content))
    found, _ = check_data(tmp_path / "a.json", tmp_path)
    assert {(one.kind, one.what, one.id) for one in found} == expected
    assert len(found) == len(expected)
    # the table is whole: every kind that the code can name is in this file, or in the next test
    sources = "".join(Path(str(module.__file__)).read_text() for module in (check, check_objects))
    kinds = set(re.findall(r'(?:yield|Finding\()\s*\(?"([a-z-]+)"', sources)) | findings.WARNINGS
    assert kinds - {kind for kind, _, _ in expected} == {"json-broken", "not-coco"}


def test_the_command_prints_writes_and_draws_them(tmp_path, capsys):
    content, expected = broken(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(content))
    arguments = ["--annotations", str(tmp_path / "a.json"), "--images", str(tmp_path), "--decode"]
    with pytest.raises(SystemExit) as stop:
        main(["check-data", *arguments, "--output", str(tmp_path / "out"), "--json", str(tmp_path / "x.json")])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert re.search(
        r"^error: annotation 116 of image 1: box-without-area: its sides are 0 x 4$", printed, re.MULTILINE
    )
    assert re.search(r"^warning: image 7: file-turned: ", printed, re.MULTILINE)
    assert re.search(r"^ +5 error +box-not-four-numbers$", printed, re.MULTILINE)
    result = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert json.loads((tmp_path / "x.json").read_text()) == result
    with open(tmp_path / "out" / "findings.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["findings"]) == len(expected) == result["errors"] + result["warnings"]
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.size == (4 * 320, 4 * 338)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("{", {"json-broken"}),
        ("[]", {"not-coco"}),
        ('{"images": 3, "categories": [], "annotations": []}', {"not-coco"}),
        ('{"images": [], "categories": []}', {"not-coco"}),
    ],
)
def test_a_file_that_is_none(tmp_path, text, kinds):
    (tmp_path / "a.json").write_text(text)
    assert {one.kind for one in check_data(tmp_path / "a.json")[0]} == kinds
    with pytest.raises(SystemExit) as stop:
        main(["check-data", "--annotations", str(tmp_path / "a.json"), "--output", str(tmp_path / "out")])
    assert stop.value.code == 1


def test_a_cut_off_image_is_found_when_it_is_decoded(tmp_path):
    Image.effect_noise((120, 90), 50).convert("RGB").save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    images = [{"id": 1, "file_name": "a.jpg", "width": 120, "height": 90}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "categories": [], "annotations": []}))
    assert check_data(tmp_path / "a.json", tmp_path)[0] == []
    (found,) = check_data(tmp_path / "a.json", tmp_path, whole=True)[0]
    assert (found.kind, found.id) == ("file-undecodable", 1)


def test_statistics_count_what_there_is():
    images = [{"id": i, "width": 200, "height": 100} for i in (1, 2)]
    boxes = {"bbox": [0, 0, 10, 10]}, {"bbox": [0, 0, 32, 32]}, {"bbox": [0, 0, 96, 96]}, {"bbox": [0, 0, 9, 90]}
    annotations = [{"id": i, "image_id": 1, "category_id": 7, **box} for i, box in enumerate(boxes)]
    annotations += [{"id": 9, "image_id": 2, "category_id": 7, "bbox": [0, 0, 50, 50], "iscrowd": 1}]
    categories = [{"id": 7, "name": "cat"}]
    found = statistics({"images": images, "annotations": annotations, "categories": categories})
    assert found["sizes"] == {"small": 2, "medium": 1, "large": 1}
    assert (found["images_with_objects"], found["images_without_objects"]) == (1, 1)
    assert (found["objects"], found["crowds"], found["per_class"]) == (4, 1, {"cat": 4})
    assert {name: n for name, n in found["box_aspect_ratios"].items() if n} == {"below 1:4": 1, "1:1 to 2:1": 3}
    assert {name: n for name, n in found["image_aspect_ratios"].items() if n} == {"2:1 to 4:1": 2}


def test_mistakes_are_a_line(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    for arguments, message in (
        (["--annotations", "/nowhere.json"], "annotations /nowhere.json is no file"),
        (["--annotations", str(tmp_path / "a.json"), "--images", "/nowhere"], "images /nowhere is no folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["check-data", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["coco_ccby", "bccd"])
def test_real_data_has_no_errors(name):
    root = real(name)
    for split in ("train", "val"):
        found, _ = check_data(root / f"instances_{split}.json", root / "images")
        assert [str(one) for one in found if one.level == "error"] == []
        assert {one.kind for one in found} <= {"category-without-objects", "area-disagrees"}  # a crowd's, by COCO
