import contextlib
import copy
import io
import json
import math
import sys

import numpy as np
import pytest
from detection_sets import annotations, detection, random_set, write
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from shared_data import real

from backbones.errors import InputError
from detection.coco_eval import FIGURES, check_results, evaluate, read_results, to_results

METRICS = ("pycocotools", "fast")


@pytest.fixture
def truth(tmp_path):
    """Three images: two cars, one train, nothing."""
    boxes = [(1, 3, [10, 10, 40, 40]), (1, 3, [60, 60, 20, 20]), (2, 7, [0, 0, 50, 50])]
    return write(tmp_path / "truth.json", annotations(boxes))


def found(image, xyxy, score, category):
    return to_results(image, np.array([xyxy], np.float32), np.array([score], np.float32), [category])


def star(rng, box):
    """A polygon about the middle of a box."""
    x, y, w, h = box
    angles, radii = np.sort(rng.random(9)) * 2 * np.pi, rng.uniform(0.3, 0.6, 9)
    points = np.stack((x + w * (0.5 + radii * np.cos(angles)), y + h * (0.5 + radii * np.sin(angles))), axis=1)
    return points.ravel().round(2).tolist()


def by_hand(path, results, kind):
    """The 12 figures as pycocotools' own example computes them; of masks without the boxes, which it would take the
    areas from.
    """
    results = copy.deepcopy(results)
    if kind == "segm":
        for row in results:
            del row["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(FIGURES, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_figures_by_hand(truth, metric):
    # Car: right, a false alarm on the empty image, then right again: precision 1 up to recall 1/2, then 2/3.
    results = (
        found(1, [10, 10, 50, 50], 0.9, 3) + found(3, [0, 0, 10, 10], 0.8, 3) + found(1, [60, 60, 80, 80], 0.7, 3)
        # Train: the box has IoU 0.6 with the truth, so that it counts at 0.50, 0.55 and 0.60 alone.
        + found(2, [0, 0, 50, 30], 0.9, 7)
    )  # fmt: skip
    result = evaluate(truth, results, metric)
    car = (51 * 1 + 50 * 2 / 3) / 101
    assert result["per_class"]["car"]["AP50"] == pytest.approx(car)
    assert result["per_class"]["car"]["AP"] == pytest.approx(car)
    assert result["per_class"]["train"] == pytest.approx({"AP50": 1.0, "AP": 0.3})
    assert result["AP50"] == pytest.approx((car + 1) / 2)
    assert result["AP"] == pytest.approx((car + 0.3) / 2)
    assert result["AP75"] == pytest.approx(car / 2)
    assert (result["images"], result["detections"], result["foreign"]) == (3, 4, 0)
    assert "segm" not in result


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(4))
def test_random_sets_are_what_pycocotools_says_by_hand(tmp_path, metric, seed):
    content, results = random_set(seed, masks=True)
    rng = np.random.default_rng(seed)
    single = [row for row in content["annotations"] if not row["iscrowd"]]
    for row in single[::2]:  # COCO's own form, of one polygon or two
        row["segmentation"] = [star(rng, row["bbox"]) for _ in range(rng.integers(1, 3))]
    path = write(tmp_path / "truth.json", content)
    before = json.dumps(results)
    result = evaluate(path, results, metric)
    assert json.dumps(results) == before
    for figures, kind in ((result, "bbox"), (result["segm"], "segm")):
        expected = by_hand(path, results, kind)
        assert 0 < expected["AP"] < 1
        assert {name: figures[name] for name in FIGURES} == pytest.approx(expected, abs=1e-9, rel=0)
    assert result["segm"]["boxes_as_masks"] == 0


@pytest.mark.parametrize("metric", METRICS)
def test_truth_against_itself_is_one_and_nothing_is_zero(tmp_path, metric):
    content, _ = random_set(5, masks=True)
    content["annotations"] = [row for row in content["annotations"] if not row["iscrowd"]]
    path = write(tmp_path / "truth.json", content)
    keys = ("image_id", "category_id", "bbox", "segmentation")
    perfect = [{**{key: row[key] for key in keys}, "score": 1.0} for row in content["annotations"]]
    result = evaluate(path, perfect, metric)
    for figures in (result, result["segm"]):
        assert [figures[name] for name in ("AP", "AP50", "AR100")] == pytest.approx([1.0, 1.0, 1.0])
        assert set(figures["per_class"]) == {"car", "train", "bus"}  # no boat is there to be found
    nothing = evaluate(path, [], metric, masks=True)
    for figures in (nothing, nothing["segm"]):
        assert figures["AP"] == figures["AP50"] == figures["AR100"] == 0
        assert figures["APl"] in (0, -1)  # -1 where there is no large object to find
    assert "segm" not in evaluate(path, [], metric)


def test_annotation_ids_do_not_matter(truth):
    content = json.loads(truth.read_text())
    results = found(1, [10, 10, 50, 50], 0.9, 3) + found(1, [60, 60, 80, 80], 0.8, 3)
    for ids in ((1, 2, 3), (0, 1, 2), (5, 5, 5)):
        for row, i in zip(content["annotations"], ids, strict=True):
            row["id"] = i
        truth.write_text(json.dumps(content))
        assert evaluate(truth, results)["per_class"]["car"]["AP50"] == pytest.approx(1.0)


def test_an_object_without_a_mask_has_its_box_for_one(truth):
    content = json.loads(truth.read_text())
    for row, mask in zip(content["annotations"], ([[10, 10, 50, 10, 50, 50, 10, 50]], [], [[1, 2, 3]]), strict=True):
        row["segmentation"] = mask
    truth.write_text(json.dumps(content))
    pixels = np.zeros((100, 100), dtype=np.uint8, order="F")
    pixels[60:80, 60:80] = 1
    counts = rle.encode(pixels)["counts"].decode()
    row = detection(1, 3, [60, 60, 20, 20], 0.9) | {"segmentation": {"size": [100, 100], "counts": counts}}
    segm = evaluate(truth, [row])["segm"]
    assert segm["boxes_as_masks"] == 2
    assert segm["per_class"]["car"]["AP50"] == pytest.approx(51 / 101)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("counts", [[5, 1000000], "abc", "0000", [10000.0], "é"])
def test_an_object_of_broken_run_lengths_has_its_box_for_a_mask(truth, metric, counts):
    content = json.loads(truth.read_text())
    for row in content["annotations"]:
        row["segmentation"] = {"size": [100, 100], "counts": counts}
    pixels = np.zeros((100, 100), dtype=np.uint8, order="F")
    pixels[:50, :50] = 1
    counts = rle.encode(pixels)["counts"].decode()
    found = detection(2, 7, [0, 0, 50, 50], 0.9) | {"segmentation": {"size": [100, 100], "counts": counts}}
    segm = evaluate(write(truth, content), [found], metric)["segm"]
    assert segm["boxes_as_masks"] == 3
    assert segm["per_class"]["train"]["AP"] == pytest.approx(1)


def test_masks_need_the_images_sizes(truth):
    content, results = random_set(0, masks=True, images=4)
    content["images"][2]["width"] = None
    with pytest.raises(InputError, match="image 3 of the annotations needs height and width to evaluate masks"):
        evaluate(write(truth, content), results)
    assert evaluate(truth, results, masks=False)["AP"] > 0


def test_classes_of_one_name_and_foreign_categories(truth):
    content = json.loads(truth.read_text())
    content["categories"][1]["name"] = "car"
    truth.write_text(json.dumps(content))
    results = found(2, [0, 0, 50, 50], 0.9, 7)
    more = results + found(1, [10, 10, 50, 50], 0.9, 99)
    result = evaluate(truth, more)
    assert result["per_class"] == {"car (3)": {"AP": 0, "AP50": 0}, "car (7)": pytest.approx({"AP": 1, "AP50": 1})}
    assert result["foreign"] == 1
    assert result["AP"] == evaluate(truth, results)["AP"]
    with pytest.raises(InputError, match="row 1 of the detections is of category 99, which .* does not list"):
        check_results(more, content, truth, categories=True)


MASK = {"segmentation": {"size": [100, 100], "counts": rle.encode(np.ones((100, 100), np.uint8, order="F"))["counts"]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "is of image 8, which .*truth.json does not list: is it the right file"),
        ({"image_id": "1"}, "is of image '1'"),
        ({"category_id": None}, "is of category None"),
        ({"bbox": [1, 2, 3]}, r"has bbox \[1, 2, 3\]: give x, y, width and height"),
        ({"bbox": [1, 2, -3, 4]}, "not negative"),
        ({"bbox": [1, 2, math.nan, 4]}, "has bbox .*finite"),
        ({"bbox": ["1", 2, 3, 4]}, "has bbox"),
        ({"bbox": None}, "has bbox None"),
        ({"score": math.inf}, "has score inf: give a finite number"),
        ({"score": None}, "has score None"),
        ({"score": "0.5"}, "has score '0.5'"),
        (MASK | {"segmentation": [[1, 2, 3, 4, 5, 6]]}, "its segmentation is no compressed RLE"),
        (MASK | {"segmentation": {"size": [50, 100], "counts": "a"}}, r"mask is of size \[50, 100\], the image of"),
        (MASK | {"segmentation": {"size": 3, "counts": "a"}}, "mask is of size 3, the image of"),
        (MASK | {"segmentation": {"size": [100, 100], "counts": "abc"}}, "run lengths are not those of 100x100 pixels"),
        (MASK | {"segmentation": {"size": [100, 100], "counts": "0000"}}, "run lengths are not those of"),
        (MASK | {"segmentation": {"size": [100, 100], "counts": "é"}}, "run lengths are not those of"),
        ({"score": 10**400}, "has score 1000"),
        ({"bbox": [True, 2, 3, None]}, "has bbox"),
    ],
)
def test_a_broken_detection_is_named(truth, change, message):
    rows = [detection(1, 3, [1, 2, 3, 4], 0.5) | (MASK if "segmentation" in change else {}) for _ in range(3)]
    rows[1] |= change
    with pytest.raises(InputError, match="row 1 of the detections .*" + message):
        evaluate(truth, rows)
    del rows[1]["bbox"]
    with pytest.raises(InputError, match="row 1 of the detections has no bbox"):
        evaluate(truth, rows)


def test_results_files(truth, tmp_path):
    path = tmp_path / "results.json"
    for text, message in (
        ("{}", "COCO's results format"), ('[{"score": 1}]', "results format"), ("[", "not JSON"),
        (json.dumps([{"image_id": 1, "category_id": 3, "score": 1}]), "row 0 has no bbox, and its segmentation is no"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_results(path)
    content, results = random_set(0, masks=True, images=4)
    for row in results:
        row.pop("bbox")
    boxes = read_results(write(path, results))
    assert evaluate(write(truth, content), boxes)["segm"]["AP"] > 0
    assert all(len(row["bbox"]) == 4 for row in boxes)


def test_fast_needs_its_extra(truth, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"install the extra cspnet\[fast\]"):
        evaluate(truth, [], "fast")


@pytest.mark.parametrize("metric", METRICS)
def test_published_figures_of_the_oracle(metric):
    root = real("coco_oracle")
    expected = json.loads((root / "expected_bbox.json").read_text())
    result = evaluate(root / "instances_gt.json", read_results(root / "detections.json"), metric)
    assert len(FIGURES) == 12
    for name in FIGURES:
        assert result[name] == pytest.approx(expected[name], abs=1e-6), name
    if metric == "fast":
        reference = by_hand(root / "instances_gt.json", read_results(root / "detections.json"), "bbox")
        assert {name: result[name] for name in FIGURES} == pytest.approx(reference, abs=1e-9, rel=0)
