import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detection_sets import annotations, detection, random_set, write
from PIL import Image
from pycocotools import mask as rle
from shared_data import real

from backbones.config import load_config
from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess
from detection import engine
from detection.__main__ import main
from detection.coco import read_coco
from detection.coco_eval import FIGURES
from detection.config import DetectorConfig
from detection.engine import evaluate
from detection.evaluate import published_figures, run_eval
from detection.images import EvaluationImages, create_loader
from detection.models import create_detector
from detection.summary import summary
from serving.shapes import draw_detection

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart" / "detector.yaml"
SMALL = [
    "model=fcos_cspresnet10_fpn", "fpn_channels=64", "preprocess.min_size=64", "preprocess.max_size=64",
    "score_threshold=0.0", "device=cpu", "data.workers=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("scenes")
    draw_detection(root, {"val": 5}, seed=0, size=96)
    return [*SMALL, f"data.images={root / 'val'}", f"data.annotations={root / 'val.json'}"]


def test_eval_writes_figures_detections_and_report_and_scores_its_own_detections(shapes, tmp_path, capsys):
    main(["eval", str(CONFIG), *shapes, f"output={tmp_path / 'a'}", "metric=fast"])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert (result["images"], result["processes"], result["metric"]) == (5, 1, "fast")
    assert result["detections"] == len(json.loads((tmp_path / "a" / "detections.json").read_text())) > 0
    assert f"AP50 {result['AP50']:.4f}" in said
    assert {path.name for path in (tmp_path / "a" / "report").iterdir()} >= {"report.html", "worst.jpg", "errors.csv"}

    detections = str(tmp_path / "a" / "detections.json")
    main(["eval", "--detections", detections, str(CONFIG), *shapes, f"output={tmp_path / 'b'}"])
    truth = next(value.partition("=")[2] for value in shapes if value.startswith("data.annotations="))
    score = ["score", "--detections", detections, "--annotations", truth]
    main([*score, "--output", str(tmp_path / "c"), "--metric", "fast"])
    for name in ("b", "c"):
        again = json.loads((tmp_path / name / "eval.json").read_text())
        assert [again[key] for key in FIGURES] == pytest.approx([result[key] for key in FIGURES], abs=1e-9)
        assert again["errors"] == result["errors"]
        assert not (tmp_path / name / "detections.json").exists()
    assert (tmp_path / "b" / "report" / "worst.jpg").exists()
    assert not (tmp_path / "c" / "report" / "worst.jpg").exists()  # no images were given


def test_mistakes_with_a_results_file_are_a_line_each(shapes, tmp_path, capsys):
    truth = write(tmp_path / "truth.json", annotations([(1, 3, [0, 0, 9, 9])]))
    row = detection(1, 3, [0, 0, 9, 9], 0.5)
    good = ["score", "--annotations", str(truth), "--output", str(tmp_path), "--detections"]
    for rows, message in (
        ([row, row | {"image_id": 9}], "row 1 of the detections is of image 9, which"),
        ([row, row | {"category_id": 9}], "row 1 of the detections is of category 9, which"),
        ([row | {"score": float("nan")}], "row 0 of the detections has score nan"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*good, str(write(tmp_path / "results.json", rows))])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    results = str(write(tmp_path / "results.json", [row]))
    for words, message in (
        ([*good, results, "--images", str(tmp_path)], "lists 1.png, which is not in"),
        ([*good, str(tmp_path / "none.json")], "cannot read"),
        (["eval", "--detections", results, str(CONFIG), "data.annotations=null"], "set data.annotations"),
        (["score", "--detections", results], "the following arguments are required: --annotations"),
        (["eval", "--detections", results], "the following arguments are required: CONFIG"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """A Mask R-CNN of random weights, and four images with truth that has masks."""
    root = tmp_path_factory.mktemp("masks")
    content, _ = random_set(0, masks=True, images=4)
    rng = np.random.default_rng(0)
    for image in content["images"]:
        Image.fromarray(rng.integers(0, 255, (100, 100, 3), dtype=np.uint8)).save(root / image["file_name"])
    write(root / "truth.json", content)
    preprocess = DetectorPreprocess(min_size=64, max_size=64)
    torch.manual_seed(0)
    model = create_detector(
        "maskrcnn_cspresnet10_fpn", 5, fpn_channels=64, score_threshold=0.0, max_detections=6, preprocess=preprocess
    )
    dataset = read_coco(str(root), str(root / "truth.json"))
    return model, EvaluationImages(dataset, preprocess), dataset, root


@pytest.mark.parametrize("amp", [False, True])
def test_masks_are_of_the_images_size_and_lie_in_their_boxes(masks, amp):
    model, images, dataset, _ = masks
    rows = evaluate(model, create_loader(images, 2, 0), dataset.category_ids, amp=amp)
    assert 0 < len(rows) <= 4 * 6
    assert [row["image_id"] for row in rows] == sorted(row["image_id"] for row in rows)
    for row in rows:
        assert row["segmentation"]["size"] == [100, 100]
        x, y, w, h = row["bbox"]
        pixels = rle.decode(row["segmentation"])
        outside = pixels.copy()
        outside[max(0, int(y) - 2) : int(y + h) + 3, max(0, int(x) - 2) : int(x + w) + 3] = 0
        assert not outside.any()
    assert json.dumps(rows)  # counts are text


def test_a_batch_that_does_not_fit_into_memory_runs_in_halves(masks, monkeypatch, capsys):
    model, images, dataset, _ = masks
    whole = evaluate(model, create_loader(images, 1, 0), dataset.category_ids)
    forward, sizes = type(model).forward, []

    def crowded(self, given, targets=None):
        sizes.append(len(given))
        if len(given) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, given, targets)

    monkeypatch.setattr(type(model), "forward", crowded)
    assert evaluate(model, create_loader(images, 4, 0), dataset.category_ids) == whole
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert "memory does not hold 4 images at once: going on with 1" in capsys.readouterr().out


def test_an_image_of_two_shares_counts_once(masks, monkeypatch):
    model, images, dataset, _ = masks
    parts = [
        engine._evaluate(model, create_loader(images, 1, 0, share), dataset.category_ids, False, "")
        for share in (range(0, 4, 2), range(0, 4))
    ]
    monkeypatch.setattr(engine, "collect", lambda work: parts)
    rows = evaluate(model, create_loader(images, 1, 0), dataset.category_ids)
    monkeypatch.undo()
    assert rows == evaluate(model, create_loader(images, 1, 0), dataset.category_ids)


def test_figures_of_masks_are_reported(masks, tmp_path):
    *_, root = masks
    config = [
        *SMALL, "model=maskrcnn_cspresnet10_fpn", f"data.images={root}", f"data.annotations={root / 'truth.json'}",
        f"output={tmp_path}", "max_detections=5",
    ]  # fmt: skip
    result = run_eval(load_config(DetectorConfig, CONFIG, config))
    assert set(FIGURES) <= set(result["segm"])
    assert "masks AP " in summary(result)


def test_published_figures_stand_beside_the_measured(shapes):
    free = [f"{name}=null" for name in ("score_threshold", "nms_iou", "max_detections")]
    config = load_config(DetectorConfig, CONFIG, [*shapes, *free])
    settings = config.preprocess.model_dump()
    metadata = {"published": {"box_map": 37.9, "mask_map": 34.6}, "preprocess": settings}
    figures = published_figures(config, metadata)
    assert figures == {"AP": 0.379, "mask_AP": 0.346, "by": "torchvision", "images": 5000, "same_settings": True}
    for other in ({"min_size": 63}, {"divisor": 2 * settings["divisor"]}):
        assert published_figures(config, metadata | {"preprocess": settings | other})["same_settings"] is False
    assert published_figures(config, {}) is None
    measured = dict.fromkeys(FIGURES, 0.5) | {"images": 3, "detections": 4, "published": figures}
    assert summary(measured).endswith(
        "published by torchvision: AP 0.379, of masks 0.346 on 5000 images, resized as tensors"
    )


@pytest.mark.slow
def test_eighty_real_classes_with_random_weights(tmp_path):
    root = real("coco_ccby")
    paths = [f"data.images={root / 'images'}", f"data.annotations={root / 'instances_val.json'}", f"output={tmp_path}"]
    result = run_eval(load_config(DetectorConfig, CONFIG, [*SMALL, *paths]))
    assert result["images"] == 45
    assert result["AP50"] < 0.05
    assert {row["category_id"] for row in json.loads((tmp_path / "detections.json").read_text())} <= set(range(1, 91))


def test_nothing_is_evaluated_where_nothing_can_be_kept(shapes, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another place"):
        run_eval(load_config(DetectorConfig, CONFIG, [*shapes, f"output={tmp_path / 'file' / 'run'}"]))
