import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import train_until_killed
from PIL import Image

from backbones.config import load_config
from backbones.cspnet import create_model
from backbones.errors import InputError
from backbones.files import sha256
from backbones.plan import Plan
from backbones.replica import average
from backbones.weights import read_weights, save_weights
from detection.augment import DetectionAugment
from detection.config import DetectorConfig
from detection.engine import Diverged, train_one_epoch
from detection.evaluate import run_eval
from detection.families import FAMILIES
from detection.images import to_image
from detection.models import build_detector, create_detector
from detection.spec import spec_of
from detection.train import run_train
from detection.weights import load_detector
from serving.shapes import draw_detection

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "detector.yaml"
WRITTEN = ("best.safetensors", "last.safetensors", "history.json", "history.csv")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    draw_detection(root, {"train": 8, "val": 4}, seed=0, size=64)
    return root


def overrides(shapes: Path, output: Path, *more: str) -> list[str]:
    return [
        f"data.train_images={shapes / 'train'}", f"data.train_annotations={shapes / 'train.json'}",
        f"data.images={shapes / 'val'}", f"data.annotations={shapes / 'val.json'}", f"output={output}",
        "data.batch_size=4", "train.epochs=2", "preprocess.min_size=64", "preprocess.max_size=64",
        "preprocess.divisor=32", *more,
    ]  # fmt: skip


def config(shapes: Path, output: Path, *more: str) -> DetectorConfig:
    return load_config(DetectorConfig, CONFIG, overrides(shapes, output, *more))


def hashes(output: Path) -> list[str]:
    return [sha256(output / name) for name in WRITTEN]


def test_interrupted_training_ends_like_an_undisturbed_one(shapes, tmp_path):
    whole = run_train(config(shapes, tmp_path / "whole"))

    class Killed(Exception):
        pass

    def kill_in_epoch_2(self, index, *args, original=DetectionAugment.__call__):
        if self.epoch == 1 and index == 5:
            raise Killed
        return original(self, index, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DetectionAugment, "__call__", kill_in_epoch_2)
        run_train(config(shapes, tmp_path / "cut"))
    resumed = run_train(config(shapes, tmp_path / "cut", "resume=true"))
    assert resumed["history"] == whole["history"]
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")

    assert run_eval(config(shapes, tmp_path / "cut", f"weights={whole['weights']}"))["AP50"] == whole["best"]["AP50"]
    detections = json.loads((tmp_path / "cut" / "detections.json").read_text())
    assert {row["category_id"] for row in detections} <= {1, 3, 5, 7}


@pytest.mark.slow
def test_killed_training_ends_like_an_undisturbed_one(shapes, tmp_path):
    everything = [
        "model=fasterrcnn_cspresnet10_fpn", "data.batch_size=2", "train.accumulate=2", "train.ema=0.8",
        "data.aspect_ratio_groups=1", "train.mosaic=0.3", "train.scale_jitter=[0.8,1.2]", "train.min_sizes=[48,64]",
    ]  # fmt: skip
    cut = overrides(shapes, tmp_path / "cut", *everything, "data.workers=2")
    train_until_killed("detection", 3, CONFIG, cut)  # the first of epoch 2
    assert len(json.loads((tmp_path / "cut" / "history.json").read_text())) == 1
    run_train(config(shapes, tmp_path / "whole", *everything, "data.workers=0"))
    run_train(config(shapes, tmp_path / "cut", *everything, "resume=true"))
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_a_resumed_run_has_the_annotations_it_began_with(shapes, tmp_path):
    run_train(config(shapes, tmp_path / "run", "train.epochs=1"))
    annotations = json.loads((shapes / "train.json").read_text())
    annotations["annotations"].pop()
    (tmp_path / "other.json").write_text(json.dumps(annotations))
    other = ("train.epochs=1", "resume=true", f"data.train_annotations={tmp_path / 'other.json'}")
    with pytest.raises(InputError, match="of a run with annotations_sha256="):
        run_train(config(shapes, tmp_path / "run", *other))


@pytest.fixture(scope="module")
def outlines(shapes, tmp_path_factory) -> Path:
    """The training annotations with boxes for masks."""
    annotations = json.loads((shapes / "train.json").read_text())
    for entry in annotations["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    path = tmp_path_factory.mktemp("outlines") / "train.json"
    path.write_text(json.dumps(annotations))
    return path


@pytest.mark.parametrize(
    ("model", "amp"),
    [("fasterrcnn_{}_fpn_v2", "false"), ("retinanet_{}_fpn", "true"), ("maskrcnn_{}_fpn", "false")],
)
def test_every_family_trains(shapes, outlines, tmp_path, model, amp):
    masks = [f"data.{part}={outlines}" for part in ("train_annotations", "annotations")]
    masks.append(f"data.images={shapes / 'train'}")
    few = (
        "train.epochs=2", "train.horizontal_flip=0", "train.vertical_flip=0", "train.color_jitter=0",
        "train.random_crop=0", "data.batch_size=2", f"model={model.format('cspresnet10')}", "max_detections=5",
        f"amp={amp}",
    )  # fmt: skip
    # With AVX-512, oneDNN's bf16 gradient of P7's weights is what lay in memory before, if P6 is one pixel as of 64 px.
    larger = ("preprocess.min_size=128", "preprocess.max_size=128") if amp == "true" else ()
    result = run_train(config(shapes, tmp_path, *few, *larger, *masks))
    first, second = (entry["loss"] for entry in result["history"])
    assert second < first
    assert ("mask_AP50" in result["best"]) == model.startswith("maskrcnn")
    parts = [value for name, value in result["best"].items() if name.startswith(("loss_", "classification", "bbox"))]
    assert sum(parts) == pytest.approx(result["best"]["loss"], rel=1e-2 if amp == "true" else 1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "fasterrcnn_v2", "retinanet_v2", "maskrcnn_v2"])
def test_every_parameter_has_a_gradient_whatever_the_batch(family):
    """Else DistributedDataParallel would wait in vain for it."""
    family, _, second = family.partition("_")
    torch.manual_seed(0)
    model = create_detector(f"{family}_cspresnet10_fpn" + "_v2" * bool(second), 3, fpn_channels=64).train()
    (images, targets), *_ = batches(1, 2)
    for target in targets:
        target["masks"] = torch.ones(len(target["boxes"]), 64, 64, dtype=torch.uint8)
    nothing = [{key: value[:0] for key, value in target.items()} for target in targets]
    for wanted in (targets, nothing):
        model.zero_grad()
        sum(model([to_image(image) for image in images], list(wanted)).values()).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_what_a_run_leaves(shapes, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run_train(config(shapes, tmp_path, "norm=null", "train.ema=0.5"))
    metadata = read_weights(result["weights"])[1]
    assert (metadata["detector"]["norm"], metadata["config"]["norm"]) == ("batch", None)  # decided once
    assert metadata["config"]["processes"] == 1
    assert load_detector(result["weights"])[1]["classes"] == ["circle", "cross", "square", "triangle"]
    with (tmp_path / "history.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == result["history"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("AP50")] == [1, 2]
    assert {"loss", "classification", "lr", "images_per_second"} <= {*events.Tags()["scalars"]}
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    key = "backbone.body.stem.conv1.conv.weight"
    assert torch.equal(read_weights(tmp_path / "last.safetensors")[0][key], saved["ema"][f"module.{key}"])
    assert not torch.equal(saved["model"][key], saved["ema"][f"module.{key}"])


def test_training_starts_from_a_whole_detector(shapes, tmp_path, capsys):
    weights = run_train(config(shapes, tmp_path / "one", "train.epochs=1"))["weights"]
    start = ("train.epochs=1", f"weights={weights}", "norm=batch", "train.optimizer=sgd", "train.lr=1e-12")
    again = run_train(config(shapes, tmp_path / "two", *start))
    assert f"started from {weights}" in capsys.readouterr().out
    one, two = (read_weights(path)[0] for path in (weights, again["weights"]))
    for key, value in one.items():
        if value.is_floating_point() and "running" not in key:
            torch.testing.assert_close(two[key], value)


def test_a_diverging_run_keeps_its_batch_for_inspection(shapes, tmp_path):
    lrs, before = Plan.lrs, []

    def wild_from_2(plan: Plan, epoch: int) -> list[float]:
        if epoch < 1:
            return lrs(plan, epoch)
        before.append(hashes(tmp_path))
        return [1e30] * plan.steps

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError) as stop:
        patch.setattr(Plan, "lrs", wild_from_2)
        run_train(config(shapes, tmp_path, "train.epochs=3"))
    message = str(stop.value)
    assert "\n" not in message
    assert "epoch 2/3: the loss is nan at step 1 (" in message
    assert f"its batch is in {tmp_path / 'diverged'}; lower train.lr" in message
    assert f"weights={tmp_path / 'last.safetensors'}" in message
    assert hashes(tmp_path) == before[0]

    kept = json.loads((tmp_path / "diverged" / "batch.json").read_text())
    assert (kept["epoch"], kept["batch"], kept["lr"]) == (2, 1, 1e30)
    assert kept["losses"]["loss"] == "nan"
    assert len(kept["images"]) == 4
    pictures = {path.name for path in (tmp_path / "diverged").glob("*.png")}
    assert pictures == {f"{entry['image_id']}.png" for entry in kept["images"]}
    for entry in kept["images"]:
        pixels = np.asarray(Image.open(tmp_path / "diverged" / f"{entry['image_id']}.png"))
        assert len(entry["boxes"]) == len(entry["classes"])
        red = (pixels == (255, 0, 0)).all(-1)
        for x1, y1, _, y2 in entry["boxes"]:  # its left edge
            edge = red[round(y1) + 1 : round(y2) - 1, max(round(x1) - 1, 0) : round(x1) + 2]
            assert edge.any(1).mean() > 0.5  # names hide some of it
    assert not list(tmp_path.glob(".diverged*"))
    run_train(config(shapes, tmp_path, "train.epochs=1", "seed=1"))
    assert (tmp_path / "previous-1" / "diverged" / "batch.json").exists()
    assert not (tmp_path / "diverged").exists()


def test_a_learning_rate_that_diverges_for_real(shapes, tmp_path):
    wild = ("train.optimizer=sgd", "train.lr=1e30", "train.warmup_epochs=0", "train.clip_grad_norm=null")
    for _ in range(2):  # the second finds the folder of the first
        with pytest.raises(InputError, match=r"the loss is (nan|inf) at step 1 \(.*and start again$"):
            run_train(config(shapes, tmp_path, *wild))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diverged", "previous-1", "tensorboard"]
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == ["diverged", "tensorboard"]


def test_mistakes_are_a_line_each(shapes, tmp_path):
    for bad, message in (
        ("data.images=/nowhere", "data.images=/nowhere is no folder"),
        ("weights=/nowhere.safetensors", "no weights at /nowhere.safetensors"),
        ("model=fcos_cspnet_fpn", "unknown detector 'fcos_cspnet_fpn'"),
        ("model=maskrcnn_cspresnet10_fpn", "has no segmentations to learn masks from"),
        ("norm=frozen", "norm=frozen freezes random weights"),
        ("norm=sync", "norm=sync works on GPUs alone"),
        ("levels=[c5,c3]", "levels"),
        ("data.batch_size=9", "8 images to train on are fewer than a step's 9"),
        ("resume=true", "resume=true but there is no"),
    ):
        with pytest.raises(InputError, match=message) as error:
            run_train(config(shapes, tmp_path, bad))
        assert "\n" not in str(error.value)


def test_cheap_mistakes_are_said_before_the_data_is_read(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("detection.train.read_coco", lambda *args, **settings: pytest.fail("was read"))
    (tmp_path / "w.safetensors").touch()
    for bad in (
        "norm=frozen", "frozen_stages=c2", "norm=sync", "levels=[c5,c3]", "weights=/nowhere", "resume=true",
        f"output={tmp_path / 'w.safetensors' / 'below'}",
    ):  # fmt: skip
        with pytest.raises(InputError):
            run_train(config(shapes, tmp_path, bad))
    with pytest.raises(InputError, match="no weights at /nowhere"):  # of the backbone, below a detector's own
        run_train(config(shapes, tmp_path, f"weights={tmp_path / 'w.safetensors'}", "weights_backbone=/nowhere"))


def test_training_and_held_out_categories_are_the_same(shapes, tmp_path):
    held_out = json.loads((shapes / "val.json").read_text())
    path = tmp_path / "val.json"
    other = f"data.annotations={path}"
    for change, message in (
        ({3: {"id": 9, "name": "star"}}, r"one of .*train.json and .*val.json lacks the categories \[7, 9\]: list"),
        ({0: {"id": 1, "name": "dog"}}, "category 1 is 'circle' for .*train.json and 'dog' in the annotations"),
        ({i: {"id": 20 + i, "name": "x"} for i in range(4)}, "train.json and the annotations have no category id in"),
    ):
        categories = [change.get(i, category) for i, category in enumerate(held_out["categories"])]
        path.write_text(json.dumps(held_out | {"categories": categories, "annotations": []}))
        with pytest.raises(InputError, match=message):
            run_train(config(shapes, tmp_path / "run", other))
    held_out["annotations"] = []
    path.write_text(json.dumps(held_out))
    with pytest.raises(InputError, match="val.json has no object to learn from: give one that has"):
        val = (f"data.train_images={shapes / 'val'}", f"data.train_annotations={path}")
        run_train(config(shapes, tmp_path / "run", *val))


def batches(count: int, size: int) -> list[tuple[tuple[torch.Tensor, ...], tuple[dict[str, torch.Tensor], ...]]]:
    """Pictures of one size with one to three boxes each."""
    loader = []
    for _ in range(count):
        images = tuple(torch.randint(256, (64, 64, 3), dtype=torch.uint8) for _ in range(size))
        corners = [torch.rand(i % 3 + 1, 2) * 32 for i in range(size)]
        targets = [{"boxes": torch.cat((xy, xy + 24), 1), "labels": torch.ones(len(xy)).long()} for xy in corners]
        loader.append((images, tuple(targets)))
    return loader


def detector(norm: str = "group") -> torch.nn.Module:
    torch.manual_seed(0)
    return create_detector("retinanet_cspresnet10_fpn", 3, fpn_channels=64, norm=norm)


def fit(model: torch.nn.Module, loader, lr: float = 0.01, **settings) -> dict[str, float]:
    lrs = [lr] * (len(loader) // settings.get("accumulate", 1))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr), torch.amp.GradScaler("cpu", enabled=False)
    return train_one_epoch(model, loader, optimizer, scaler, lrs, **settings)


def test_accumulated_batches_are_one_large_batch():
    small = batches(4, 2)
    large = [tuple(one + other for one, other in zip(*small[i : i + 2], strict=True)) for i in (0, 2)]
    one, other = detector(), detector()
    figures, same = fit(one, small, accumulate=2), fit(other, large)
    assert figures["images"] == same["images"] == 8
    assert figures["loss"] == pytest.approx(same["loss"], rel=1e-4)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-3, atol=1e-6)


def test_the_gradient_is_clipped():
    model = detector()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    fit(model, batches(1, 2), lr=1.0, clip_grad_norm=0.01)
    moved = torch.cat([(now - then).flatten() for now, then in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_weights_and_statistics_are_averaged_and_counts_are_not():
    loader, after = batches(2, 2), []
    for steps in (1, 2):
        model = detector("batch")
        ema = average(model, 0.75)
        fit(model, loader[:steps], ema=ema)
        after.append((model.state_dict(), ema.module.state_dict()))
    (first, averaged_first), (second, averaged_second) = after
    for key, value in averaged_second.items():
        assert torch.equal(averaged_first[key], first[key])
        mean = 0.75 * first[key] + 0.25 * second[key] if value.is_floating_point() else second[key]
        torch.testing.assert_close(value, mean)
    assert averaged_second["backbone.body.stem.conv1.bn.num_batches_tracked"] == 2


@pytest.mark.parametrize("broken", [2, 3])
def test_the_batch_that_diverged_is_named(broken):
    model = detector()
    forward, calls = model.forward, itertools.count()

    def breaking(*args):
        losses = forward(*args)
        return {name: loss * math.nan for name, loss in losses.items()} if next(calls) == broken else losses

    model.forward = breaking
    with pytest.raises(Diverged, match="the loss is nan at step 1 ") as stop:
        fit(model, batches(4, 2), accumulate=2)
    assert stop.value.batch == broken
    assert {*stop.value.losses[0]} == {"loss", "classification", "bbox_regression"}


def test_frozen_parts_stay_as_they_are(shapes, tmp_path):
    weights = tmp_path / "backbone.safetensors"
    save_weights(weights, create_model("cspresnet10", 10), {"task": "classification", "model": "cspresnet10"})
    start = config(
        shapes, tmp_path / "run", f"weights_backbone={weights}", "norm=null", "frozen_stages=null", "train.epochs=1",
        "train.ema=0.9",
    )  # fmt: skip
    result = run_train(start)
    first = build_detector(spec_of(start, 5), start.preprocess, weights).state_dict()
    last = read_weights(result["weights"])[0]
    frozen = [key for key in last if key.startswith(("backbone.body.stem", "backbone.body.stages.0", "running"))]
    assert len(frozen) > 10
    assert all(torch.equal(first[key], last[key]) for key in frozen)
    assert not torch.equal(first["backbone.fpn.inner_blocks.0.0.weight"], last["backbone.fpn.inner_blocks.0.0.weight"])

    weights.unlink()  # a resumed run does without, as long as what hangs on them is the same
    assert run_train(start.model_copy(update={"resume": True, "metric": "fast"}))["history"] == result["history"]
    with pytest.raises(InputError, match="of a run with norm=frozen, not batch"):
        run_train(start.model_copy(update={"resume": True, "weights_backbone": None}))
