"""A detector trained and evaluated by two processes of torchrun, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backbones.config import load_config
from backbones.files import sha256
from backbones.weights import read_weights
from detection.coco_eval import FIGURES
from detection.config import DetectorConfig
from detection.evaluate import run_eval
from detection.train import run_train
from serving.shapes import draw_detection

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart" / "detector.yaml"

# Each process's work: a run that one process can repeat, a whole run with everything, one that is cut and resumed, and
# one that diverges, first in both and then in one alone; and an evaluation.
DRIVER = """
import sys
import torch
from backbones.config import load_config
from backbones.distributed import process_group, rank
from backbones.errors import InputError
from detection import engine, train
from detection.__main__ import main
from detection.config import DetectorConfig

path, output, *overrides = sys.argv[1:]

def run(name, *more):
    return train.run_train(load_config(DetectorConfig, path, [*overrides, *more, f"output={output}/{name}"]))

class Cut(Exception):
    pass

replicate, take_step, steps = train.replicate, engine.take_step, []

def break_one(model, device):
    forward, batches = model.forward, []
    def broken(*args):
        losses = forward(*args)
        batches.append(1)
        return {name: loss * float("nan") for name, loss in losses.items()} if len(batches) == 2 else losses
    if rank() == 1:
        model.forward = broken
    return replicate(model, device)

def cut(*args):
    steps.append(1)
    if len(steps) == 4:
        raise Cut
    take_step(*args)

with process_group(torch.device("cpu")):
    main(["eval", path, *overrides, *EVALUATED, f"output={output}/two"])
    run("alike", *ALIKE, "data.batch_size=2")
    everything = EVERYTHING
    run("whole", *everything)
    engine.take_step = cut
    try:
        run("cut", *everything)
        raise SystemExit("was not cut")
    except Cut:
        engine.take_step = take_step
    run("cut", *everything, "resume=true")
    try:
        run("wild", "train.optimizer=sgd", "train.lr=1e30", "train.warmup_epochs=0", "train.clip_grad_norm=null")
    except InputError as error:
        print(error)
    train.replicate = break_one
    try:
        run("lonely")
        raise SystemExit("did not diverge")
    except InputError as error:
        print(f"{rank()} says: {error}")
"""
# SGD: where a gradient is all but zero, AdamW makes a step of its rounding. RetinaNet: its loss is a mean over images.
ALIKE = [
    "model=retinanet_cspresnet10_fpn", "norm=group", "data.aspect_ratio_groups=0", "train.optimizer=sgd",
    "train.lr=0.01", "train.lr_batch=4",
]  # fmt: skip
EVERYTHING = [
    "model=fasterrcnn_cspresnet10_fpn", "data.batch_size=2", "train.accumulate=2", "train.ema=0.8",
    "data.aspect_ratio_groups=1", "max_detections=5",
]  # fmt: skip

EVALUATED = ["score_threshold=0.0", "data.batch_size=1"]  # random weights find something


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("scenes")
    draw_detection(root, {"train": 17, "val": 5}, seed=0, size=64)
    return [
        f"data.train_images={root / 'train'}", f"data.train_annotations={root / 'train.json'}",
        f"data.images={root / 'val'}", f"data.annotations={root / 'val.json'}", "data.batch_size=4", "train.epochs=2",
        "preprocess.min_size=64", "preprocess.max_size=64", "preprocess.divisor=32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    driver = DRIVER
    for name, overrides in (("ALIKE", ALIKE), ("EVERYTHING", EVERYTHING), ("EVALUATED", EVALUATED)):
        driver = driver.replace(name, repr(overrides))
    (output / "driver.py").write_text(driver)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(output / "driver.py"), str(CONFIG), str(output), *data],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (output / "stdout").write_text(done.stdout)
    return output


def test_two_processes_are_one_with_double_the_batch(data, runs, tmp_path):
    one = run_train(load_config(DetectorConfig, CONFIG, [*data, *ALIKE, "data.batch_size=4", f"output={tmp_path}"]))
    two = json.loads((runs / "alike" / "history.json").read_text())
    for name in ("lr", "loss", "classification", "bbox_regression"):
        assert [entry[name] for entry in two] == pytest.approx([entry[name] for entry in one["history"]], rel=1e-3)
    weights = [read_weights(folder / "last.safetensors")[0] for folder in (tmp_path, runs / "alike")]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-3, atol=1e-5)


def test_two_processes_evaluate_as_one(data, runs, tmp_path):
    torch.set_num_threads(1)  # as the two have: sums of another number of threads differ in the last bits
    one = run_eval(load_config(DetectorConfig, CONFIG, [*data, *EVALUATED, f"output={tmp_path}"]))
    two = json.loads((runs / "two" / "eval.json").read_text())
    assert two["processes"] == 2
    assert {name: two[name] for name in FIGURES} == {name: one[name] for name in FIGURES}
    detections = [json.loads((folder / "detections.json").read_text()) for folder in (tmp_path, runs / "two")]
    assert len(detections[0]) == len(detections[1]) > 0
    assert detections[0] == detections[1]
    assert (runs / "stdout").read_text().count("report/report.html") == 1


def test_two_processes_resume_exactly(runs):
    for name in ("last.safetensors", "best.safetensors", "history.json"):
        assert sha256(runs / "cut" / name) == sha256(runs / "whole" / name)


def test_one_process_speaks_and_each_keeps_its_diverged_batch(runs):
    said = (runs / "stdout").read_text()
    assert said.count("epoch 1/2: loss") == 3
    assert said.count("images/s") == 6
    assert "images a step: 8 (batch 2 x accumulate 2 x 2 processes); left out of each epoch: 1" in said
    kept = [json.loads((runs / "wild" / f"diverged{rank}" / "batch.json").read_text()) for rank in ("", "-1")]
    images = [{entry["image_id"] for entry in batch["images"]} for batch in kept]
    assert [len(part) for part in images] == [4, 4]
    assert not images[0] & images[1]


def test_one_process_that_diverges_stops_all_and_alone_keeps_its_batch(runs):
    said = (runs / "stdout").read_text()
    kept = runs / "lonely" / "diverged-1"
    for rank in range(2):
        (line,) = (line for line in said.splitlines() if line.startswith(f"{rank} says: "))
        assert "epoch 1/2: the loss is nan at step 1 (classification nan" in line
        assert f"its batch is in {kept}; lower train.lr" in line
    batch = json.loads((kept / "batch.json").read_text())
    assert (batch["batch"], batch["losses"]["loss"], len(batch["images"])) == (1, "nan", 4)
    assert not (runs / "lonely" / "diverged").exists()
