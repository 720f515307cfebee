import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from killed import train_until_killed
from torch import nn

from backbones.augment import TrainAugment
from backbones.checkpoint import Run
from backbones.config import ClassifierConfig, load_config
from backbones.cspnet import create_model
from backbones.distributed import process_group
from backbones.engine import normalize, train_one_epoch
from backbones.errors import InputError
from backbones.evaluate import run_eval
from backbones.files import sha256
from backbones.plan import Plan
from backbones.preprocess import ClassifierPreprocess
from backbones.replica import average
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


def hashes(output: Path) -> list[str]:
    return [sha256(output / name) for name in ("best.safetensors", "last.safetensors", "history.json", "history.csv")]


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
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_the_best_weights_are_those_of_the_history(shapes, tmp_path, monkeypatch):
    """Killed after an epoch was finished and before its weights were kept as the best."""
    best = Run._save_best

    def killed(run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_save_best", killed)
    with pytest.raises(KeyboardInterrupt):
        run_train(config(shapes, tmp_path, "train.epochs=1"))
    assert not (tmp_path / "best.safetensors").exists()
    monkeypatch.setattr(Run, "_save_best", best)
    result = run_train(config(shapes, tmp_path, "train.epochs=1", "resume=true"))
    assert len(result["history"]) == 1
    assert sha256(tmp_path / "best.safetensors") == sha256(tmp_path / "last.safetensors")


@pytest.mark.slow
def test_killed_training_ends_like_an_undisturbed_one(shapes, tmp_path):
    everything = [
        f"data.root={shapes}", "preprocess.resize=32", "preprocess.crop=32", "train.epochs=2", "data.batch_size=8",
        "train.accumulate=2", "train.ema=0.8", "train.mixup=0.2", "train.cutmix=1", "train.drop_path=0.2",
        "train.randaugment=5", "train.random_erasing=0.3", "train.clip_grad_norm=1", "data.workers=2",
    ]  # fmt: skip
    train_until_killed("backbones", 5, CONFIG, [*everything, f"output={tmp_path / 'cut'}"])  # the second of epoch 2
    assert len(json.loads((tmp_path / "cut" / "history.json").read_text())) == 1
    for output, more in (("whole", "data.workers=0"), ("cut", "resume=true")):
        run_train(load_config(ClassifierConfig, CONFIG, [*everything, f"output={tmp_path / output}", more]))
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    assert not [path for path in (tmp_path / "cut").iterdir() if path.name.startswith(".last")]


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


def test_a_diverging_run_keeps_its_last_checkpoint(shapes, tmp_path, monkeypatch):
    lrs, before = Plan.lrs, []

    def wild_from_2(plan: Plan, epoch: int) -> list[float]:
        if epoch < 1:
            return lrs(plan, epoch)
        before.append((hashes(tmp_path), sha256(tmp_path / "last.pt")))
        return [1e30] * plan.steps

    monkeypatch.setattr(Plan, "lrs", wild_from_2)
    for resume in ("false", "true"):
        with pytest.raises(InputError, match="lower train.lr"):
            run_train(config(shapes, tmp_path, "train.epochs=2", f"resume={resume}"))
        assert (hashes(tmp_path), sha256(tmp_path / "last.pt")) == before[0]


def test_another_runs_checkpoint_is_refused(shapes, tmp_path):
    run_train(config(shapes, tmp_path, "train.epochs=1"))
    draw_classification(tmp_path / "fewer", {"train": 40, "val": 16}, seed=0, size=32)
    for change, message in (
        ("seed=5", "seed=0, not 5"),
        ("train.weight_decay=0.9", "train.weight_decay=0.05, not 0.9"),
        ("train.ema=0.9", "train.ema=None, not 0.9"),
        ("channels_last=true", "channels_last=False, not True"),
        (f"data.root={tmp_path / 'fewer'}", "images=48, not 40"),
    ):
        with pytest.raises(InputError, match=message):
            run_train(config(shapes, tmp_path, "train.epochs=1", "resume=true", change))
    for content in (b"", b"junk"):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(InputError, match="last.pt is no checkpoint of a run"):
            run_train(config(shapes, tmp_path, "resume=true"))


def test_a_run_that_stopped_at_a_broken_image_may_go_on_without_it(shapes, tmp_path):
    run_train(config(shapes, tmp_path, "train.epochs=1"))
    skipping = config(shapes, tmp_path, "train.epochs=1", "resume=true", "data.on_error=skip")
    assert run_train(skipping)["history"]
    run_train(config(shapes, tmp_path, "train.epochs=1", "data.on_error=skip"))
    with pytest.raises(InputError, match="data.on_error=skip, not stop"):  # it may have skipped some
        run_train(config(shapes, tmp_path, "train.epochs=1", "resume=true"))


def test_another_runs_files_are_kept(shapes, tmp_path, capsys):
    kept = []
    for seed in range(3):
        with pytest.raises(InputError, match="classes"):  # before training, nothing is moved
            run_train(config(shapes, tmp_path, "train.epochs=1", "num_classes=5"))
        run_train(config(shapes, tmp_path, "train.epochs=1", f"seed={seed}"))
        kept.append([sha256(tmp_path / "last.pt"), *hashes(tmp_path)])
        (tmp_path / "eval.json").write_text("{}")  # not of the run
    for number in (1, 2):
        place = tmp_path / f"previous-{number}"
        assert [sha256(place / "last.pt"), *hashes(place)] == kept[number - 1]
        assert list((place / "tensorboard").iterdir())
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.glob("previous*")) == ["previous-1", "previous-2"]
    assert capsys.readouterr().out.count("its files are now in") == 2


def test_what_a_killed_run_was_writing_is_removed(shapes, tmp_path):
    left, other = tmp_path / ".last.abcd_123.pt", tmp_path / ".lastly.pt"
    for path in (left, other):
        path.touch()
    run_train(config(shapes, tmp_path, "train.epochs=1"))
    assert (left.exists(), other.exists()) == (False, True)


def test_training_goes_on_with_the_classes_of_its_weights(shapes, tmp_path):
    weights = run_train(config(shapes, tmp_path / "one", "train.epochs=1"))["weights"]
    few = tmp_path / "few"
    for split in ("train", "val"):
        for name in ("cross", "square"):
            shutil.copytree(shapes / split / name, few / split / name)
    start = ("train.epochs=1", f"weights={weights}")
    again = run_train(config(few, tmp_path / "two", *start))
    assert read_weights(again["weights"])[1]["classes"] == ["circle", "cross", "square", "triangle"]
    with pytest.raises(InputError, match="has 2 classes but num_classes=4"):
        run_train(config(few, tmp_path / "three", *start, "ignore_head=true"))
    anew = run_train(config(few, tmp_path / "three", *start, "ignore_head=true", "num_classes=2"))
    assert read_weights(anew["weights"])[1]["classes"] == ["cross", "square"]

    Path(weights).unlink()  # a resumed run does without
    for output, more in (("two", ()), ("three", ("ignore_head=true", "num_classes=2"))):
        resumed = run_train(config(few, tmp_path / output, *start, *more, "resume=true"))
        assert resumed["history"] == (again if output == "two" else anew)["history"]


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


def test_logs_of_a_run(shapes, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run_train(config(shapes, tmp_path, "train.epochs=2"))
    with (tmp_path / "history.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == result["history"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("top1")] == [1, 2]
    assert events.Scalars("loss")[1].value == pytest.approx(rows[1]["loss"])
    assert "images_per_second" in events.Tags()["scalars"]
    assert "epoch" not in events.Tags()["scalars"]


def test_broken_images_stop_training_or_are_counted(shapes, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    broken = next((root / "train").rglob("*.png"))
    broken.write_bytes(b"junk")
    with pytest.raises(InputError, match=broken.name):
        run_train(config(root, tmp_path / "stop", "train.epochs=1", "data.workers=1"))
    next((root / "val").rglob("*.png")).write_bytes(b"junk")
    result = run_train(config(root, tmp_path / "skip", "train.epochs=1", "data.on_error=skip"))
    assert (result["best"]["skipped"], result["best"]["val_skipped"]) == (1, 1)
    assert "1 broken images skipped, 1 held-out ones, which top-1 is without" in capsys.readouterr().out


def test_one_process_of_one_is_alone(monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    with process_group(torch.device("cpu")) as device:
        assert (device.type, torch.distributed.is_initialized()) == ("cpu", False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR"), process_group(torch.device("cpu")):
        pass


def test_a_device_gets_the_constants_once(monkeypatch):
    made, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **settings: made.append(settings) or tensor(*args, **settings))
    pixels, spec = torch.zeros(1, 2, 2, 3, dtype=torch.uint8, device="meta"), ClassifierPreprocess(resize=33, crop=32)
    for _ in range(3):
        assert normalize(pixels, spec).shape == (1, 3, 2, 2)
    assert len(made) == 2  # mean and deviation: each a copy that a GPU is waited for


def batches(count: int, size: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    pixels = torch.randint(256, (count * size, 32, 32, 3), dtype=torch.uint8)
    indices = torch.arange(count * size)
    return list(zip(pixels.split(size), indices.split(size), strict=True)), torch.randint(4, (count * size,))


def fit(model: nn.Module, loader, targets: torch.Tensor, lr: float = 0.1, **settings) -> dict[str, float]:
    steps = len(loader) // settings.get("accumulate", 1)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr), torch.amp.GradScaler("cpu", enabled=False)
    spec = ClassifierPreprocess(resize=32, crop=32)
    return train_one_epoch(model, loader, targets, optimizer, scaler, spec, [lr] * steps, **settings)


def test_accumulated_batches_are_one_large_batch():
    small, targets = batches(6, 4)
    large = [tuple(torch.cat(parts) for parts in zip(*small[i : i + 3], strict=True)) for i in (0, 3)]
    start = create_model("cspresnet10", 4, batchnorm="frozen").state_dict()
    results = []
    for loader, accumulate in ((small, 3), (large, 1)):
        model = create_model("cspresnet10", 4, batchnorm="frozen")
        model.load_state_dict(start)
        results.append((model, fit(model, loader, targets, accumulate=accumulate, label_smoothing=0.1)))
    (one, figures), (other, same) = results
    assert figures["loss"] == pytest.approx(same["loss"], rel=1e-5)
    assert figures["train_top1"] == same["train_top1"]
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-4, atol=1e-6)
    assert not torch.equal(one.stem.conv1.conv.weight, start["stem.conv1.conv.weight"])


def linear() -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    nn.init.zeros_(model[1].weight)
    return model


def test_averaged_weights_by_hand():
    loader, targets = batches(2, 4)
    after = []
    for steps in (1, 2):
        model = linear()
        nn.init.zeros_(model[1].bias)
        ema = average(model, 0.75)
        fit(model, loader[:steps], targets, ema=ema)
        after.append((model[1].weight.detach(), ema.module[1].weight.detach()))
    (first, averaged_first), (second, averaged_second) = after
    assert torch.equal(averaged_first, first)
    torch.testing.assert_close(averaged_second, 0.75 * first + 0.25 * second)


def test_the_gradient_is_clipped_to_its_norm():
    loader, targets = batches(1, 4)
    model = linear()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    fit(model, loader, targets, lr=1.0, clip_grad_norm=0.01)
    moved = torch.cat([(now - then).flatten() for now, then in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_an_accuracy_of_mixed_images_is_not_given():
    loader, targets = batches(1, 4)
    mixed = fit(linear(), loader, targets, mix=lambda images, labels: (images, nn.functional.one_hot(labels, 4) * 1.0))
    assert "train_top1" not in mixed
    assert mixed["loss"] == pytest.approx(fit(linear(), loader, targets)["loss"], rel=0.05)


def test_a_batch_of_broken_images_is_said():
    loader, targets = batches(1, 1)
    with pytest.raises(InputError, match="1 images of a batch could be decoded"):
        fit(linear(), loader, targets)
