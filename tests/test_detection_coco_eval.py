import json

import numpy as np
import pytest
from shared_data import real

from backbones.errors import InputError
from detection.coco_eval import FIGURES, evaluate, read_results, to_results

CATEGORIES = [{"id": 3, "name": "car"}, {"id": 7, "name": "train"}]


@pytest.fixture
def truth(tmp_path):
    """Three images: two cars, one train, nothing."""
    boxes = [(1, 3, [10, 10, 40, 40]), (1, 3, [60, 60, 20, 20]), (2, 7, [0, 0, 50, 50])]
    annotations = [{"image_id": image, "category_id": category, "bbox": xywh} for image, category, xywh in boxes]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in (1, 2, 3)]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path


def found(image, xyxy, score, category):
    return to_results(image, np.array([xyxy], np.float32), np.array([score], np.float32), [category])


def test_figures_by_hand(truth):
    # Car: right, a false alarm on the empty image, then right again: precision 1 up to recall 1/2, then 2/3.
    results = (
        found(1, [10, 10, 50, 50], 0.9, 3) + found(3, [0, 0, 10, 10], 0.8, 3) + found(1, [60, 60, 80, 80], 0.7, 3)
        # Train: the box has IoU 0.6 with the truth, so that it counts at 0.50, 0.55 and 0.60 alone.
        + found(2, [0, 0, 50, 30], 0.9, 7)
    )  # fmt: skip
    result = evaluate(truth, results)
    car = (51 * 1 + 50 * 2 / 3) / 101
    assert result["per_class"]["car"]["AP50"] == pytest.approx(car)
    assert result["per_class"]["car"]["AP"] == pytest.approx(car)
    assert result["per_class"]["train"] == pytest.approx({"AP50": 1.0, "AP": 0.3})
    assert result["AP50"] == pytest.approx((car + 1) / 2)
    assert result["AP"] == pytest.approx((car + 0.3) / 2)
    assert result["AP75"] == pytest.approx(car / 2)
    assert (result["images"], result["detections"]) == (3, 4)


def test_truth_against_itself_is_one_and_nothing_is_zero(truth):
    perfect = [
        {**{key: row[key] for key in ("image_id", "category_id", "bbox")}, "score": 1.0}
        for row in json.loads(truth.read_text())["annotations"]
    ]
    assert evaluate(truth, perfect)["AP"] == pytest.approx(1.0)
    nothing = evaluate(truth, [])
    assert nothing["AP"] == nothing["AP50"] == nothing["AR100"] == 0
    assert nothing["APl"] == -1  # there is no large object to find


def test_annotation_ids_do_not_matter(truth):
    content = json.loads(truth.read_text())
    results = found(1, [10, 10, 50, 50], 0.9, 3) + found(1, [60, 60, 80, 80], 0.8, 3)
    for ids in ((1, 2, 3), (0, 1, 2), (5, 5, 5)):
        for row, i in zip(content["annotations"], ids, strict=True):
            row["id"] = i
        truth.write_text(json.dumps(content))
        assert evaluate(truth, results)["per_class"]["car"]["AP50"] == pytest.approx(1.0)


def test_results_are_not_changed(truth):
    results = found(1, [10, 10, 50, 50], 0.9, 3)
    before = json.dumps(results)
    evaluate(truth, results)
    assert json.dumps(results) == before


def test_foreign_detections_and_files(truth, tmp_path):
    with pytest.raises(InputError, match="detections of image 8"):
        evaluate(truth, found(8, [0, 0, 1, 1], 0.5, 3))
    path = tmp_path / "results.json"
    for text, message in (("{}", "COCO's results format"), ('[{"score": 1}]', "results format"), ("[", "not JSON")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_results(path)


def test_published_figures_of_the_oracle():
    root = real("coco_oracle")
    expected = json.loads((root / "expected_bbox.json").read_text())
    result = evaluate(root / "instances_gt.json", read_results(root / "detections.json"))
    assert len(FIGURES) == 12
    for name in FIGURES:
        assert result[name] == pytest.approx(expected[name], abs=1e-6), name
