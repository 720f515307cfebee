import json
from pathlib import Path

import pytest
import torch
from shared_data import real

from backbones.config import load_config
from backbones.errors import InputError
from detection.__main__ import main
from detection.augment import DetectionAugment
from detection.config import DetectorConfig
from detection.evaluate import run_eval
from detection.train import run_train
from serving.shapes import draw_detection

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "detector.yaml"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    draw_detection(root, {"train": 12, "val": 6}, seed=0, size=96)
    return root


def overrides(shapes: Path, output: Path) -> list[str]:
    return [
        f"data.train_images={shapes / 'train'}", f"data.train_annotations={shapes / 'train.json'}",
        f"data.images={shapes / 'val'}", f"data.annotations={shapes / 'val.json'}", f"output={output}",
        "data.batch_size=4", "train.epochs=2", "preprocess.min_size=96", "preprocess.max_size=96",
    ]  # fmt: skip


def test_interrupted_training_ends_like_an_undisturbed_one(shapes, tmp_path):
    whole = run_train(load_config(DetectorConfig, CONFIG, overrides(shapes, tmp_path / "whole")))

    class Killed(Exception):
        pass

    def kill_in_epoch_2(self, image, boxes, labels, index, original=DetectionAugment.__call__):
        if self.epoch == 1 and index == 5:
            raise Killed
        return original(self, image, boxes, labels, index)

    cut = overrides(shapes, tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DetectionAugment, "__call__", kill_in_epoch_2)
        run_train(load_config(DetectorConfig, CONFIG, cut))
    resumed = run_train(load_config(DetectorConfig, CONFIG, [*cut, "resume=true"]))
    assert resumed["history"] == whole["history"]  # to the bit
    one, other = (torch.load(tmp_path / run / "last.pt", weights_only=True)["model"] for run in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)

    config = load_config(DetectorConfig, CONFIG, [*cut, f"weights={whole['weights']}"])
    assert run_eval(config)["AP50"] == whole["best"]["AP50"]
    detections = json.loads((tmp_path / "cut" / "detections.json").read_text())
    assert all(set(row) == {"image_id", "category_id", "bbox", "score"} for row in detections)
    assert {row["category_id"] for row in detections} <= {1, 3, 5, 7}


def test_many_processes_are_refused(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for run in (run_train, run_eval):
        with pytest.raises(InputError, match="in one process alone, not in 4: leave torchrun out"):
            run(load_config(DetectorConfig, CONFIG, overrides(shapes, tmp_path)))


def test_a_resumed_run_has_the_annotations_it_began_with(shapes, tmp_path):
    few = [*overrides(shapes, tmp_path / "run"), "train.epochs=1"]
    run_train(load_config(DetectorConfig, CONFIG, few))
    annotations = json.loads((shapes / "train.json").read_text())
    annotations["annotations"].pop()
    (tmp_path / "other.json").write_text(json.dumps(annotations))
    other = [*few, "resume=true", f"data.train_annotations={tmp_path / 'other.json'}"]
    with pytest.raises(InputError, match="of a run with annotations_sha256="):
        run_train(load_config(DetectorConfig, CONFIG, other))


@pytest.mark.parametrize("family", ["fasterrcnn", "retinanet"])
def test_every_family_trains(shapes, tmp_path, family):
    few = [*overrides(shapes, tmp_path), f"model={family}_cspresnet10_fpn", "train.epochs=1"]
    result = run_train(load_config(DetectorConfig, CONFIG, few))
    assert 0 <= result["best"]["AP50"] <= 1


def test_mistakes_are_a_line_each(shapes, tmp_path, capsys):
    good = overrides(shapes, tmp_path)
    for bad, message in (
        ("data.images=/nowhere", "data.images=/nowhere is no folder"),
        ("weights=/nowhere.safetensors", "no weights at /nowhere.safetensors"),
        ("model=fcos_cspnet_fpn", "unknown detector 'fcos_cspnet_fpn'"),
        ("device=cuda:99", "device=cuda:99 is not usable here"),
        ("fpn_channels=50", "fpn_channels=50: "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["eval", str(CONFIG), *good, bad])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(InputError, match="lower train.lr"):
        run_train(load_config(DetectorConfig, CONFIG, [*good, "train.optimizer=sgd", "train.lr=1e30"]))


@pytest.mark.slow
def test_eighty_real_classes_with_random_weights(tmp_path):
    root = real("coco_ccby")
    paths = [f"data.images={root / 'images'}", f"data.annotations={root / 'instances_val.json'}", f"output={tmp_path}"]
    result = run_eval(load_config(DetectorConfig, CONFIG, [*paths, "score_threshold=0.0"]))
    assert result["images"] == 45
    assert result["AP50"] < 0.05
    assert {row["category_id"] for row in json.loads((tmp_path / "detections.json").read_text())} <= set(range(1, 91))
