import json
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.augment import TrainAugment
from backbones.checkpoint import Run
from backbones.config import ClassifierConfig, load_config
from backbones.engine import warmup_cosine
from backbones.errors import InputError
from backbones.evaluate import run_eval
from backbones.train import run_train
from backbones.weights import read_weights
from serving.shapes import draw_classification

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "classifier.yaml"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    draw_classification(root, {"train": 48, "val": 16}, seed=0, size=32)
    return root


def config(shapes: Path, output: Path, *overrides: str) -> ClassifierConfig:
    small = [f"data.root={shapes}", f"output={output}", "preprocess.resize=32", "preprocess.crop=32", "train.epochs=3"]
    return load_config(ClassifierConfig, CONFIG, [*small, "data.batch_size=16", *overrides])


def test_interrupted_training_ends_like_an_undisturbed_one(shapes, tmp_path):
    whole = run_train(config(shapes, tmp_path / "whole", "data.workers=1"))
    calls = []

    class Killed(Exception):
        pass

    def kill_in_epoch_3(self, pixels, index, original=TrainAugment.__call__):
        calls.append(index)
        if self.epoch == 2 and len(calls) > 100:
            raise Killed
        return original(self, pixels, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainAugment, "__call__", kill_in_epoch_3)
        run_train(config(shapes, tmp_path / "cut"))
    resumed = run_train(config(shapes, tmp_path / "cut", "resume=true"))
    assert resumed["history"] == whole["history"]  # to the bit, whatever the number of workers
    one, other = (torch.load(tmp_path / run / "last.pt", weights_only=True)["model"] for run in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_evaluation_repeats_the_best_epoch(shapes, tmp_path):
    result = run_train(config(shapes, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == result["history"]
    metadata = read_weights(result["weights"])[1]
    assert (metadata["task"], metadata["model"]) == ("classification", "cspresnet10")
    assert metadata["classes"] == ["circle", "cross", "square", "triangle"]
    measured = run_eval(config(shapes, tmp_path / "run", f"weights={result['weights']}"))
    assert measured["top1"] == result["best"]["top1"]
    assert len(measured["weights_sha256"]) == 64


def test_a_loss_that_is_not_finite_stops_the_run(shapes, tmp_path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+: lower train.lr"):
        run_train(config(shapes, tmp_path, "train.lr=1e30", "train.warmup_epochs=0", "train.optimizer=sgd"))
    assert not (tmp_path / "best.safetensors").exists()


def test_another_runs_checkpoint_is_refused(shapes, tmp_path):
    run_train(config(shapes, tmp_path, "train.epochs=1"))
    for change, message in (("seed=5", "seed=0, not 5"), ("train.weight_decay=0.9", "a run with train=")):
        with pytest.raises(InputError, match=message):
            run_train(config(shapes, tmp_path, "train.epochs=1", "resume=true", change))
    for content in (b"", b"junk"):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(InputError, match="last.pt is no checkpoint of a run"):
            run_train(config(shapes, tmp_path, "resume=true"))


def test_of_equal_epochs_the_first_is_the_best(shapes, tmp_path):
    settings = config(shapes, tmp_path)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    run = Run(settings, model, optimizer, torch.amp.GradScaler("cpu", enabled=False), "top1", {})
    for epoch, top1 in enumerate((0.25, 0.25, 0.125), start=1):
        torch.nn.init.constant_(model.weight, epoch)
        run.finish_epoch({"top1": top1})
    assert run.result()["best"] == {"epoch": 1, "top1": 0.25}
    assert read_weights(tmp_path / "best.safetensors")[0]["weight"].item() == 1


def test_training_needs_its_own_held_out_images_and_a_place_to_write(shapes, tmp_path):
    with pytest.raises(InputError, match="has no separate 'val' folder to evaluate on"):
        run_train(config(shapes / "train", tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*choose another place"):
        run_train(config(shapes, tmp_path / "file" / "run"))


def test_weights_say_nothing_of_where_they_were_made(shapes, tmp_path):
    result = run_train(config(shapes, tmp_path, "train.epochs=1"))
    content = Path(result["weights"]).read_bytes()
    assert str(tmp_path).encode() not in content
    assert str(shapes).encode() not in content


def test_nothing_to_resume(shapes, tmp_path):
    with pytest.raises(InputError, match="resume=true but there is no"):
        run_train(config(shapes, tmp_path, "resume=true"))


def test_learning_rate_rises_and_falls():
    rates = [warmup_cosine(step, 100, 10) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    one, other = (TrainAugment(32, 0.3, 0.5, 0.5, 0.2, seed=1) for _ in range(2))
    other(pixels, 5)
    np.testing.assert_array_equal(one(pixels, 3), other(pixels, 3))
    assert one(pixels, 3).shape == (32, 32, 3)
    assert (one(pixels, 3) != one(pixels, 4)).any()
    first = one(pixels, 3)
    one.epoch = 1
    assert (one(pixels, 3) != first).any()
