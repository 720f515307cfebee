"""Training by two processes of torchrun, on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backbones import train
from backbones.config import ClassifierConfig, load_config
from backbones.files import sha256
from backbones.weights import read_weights
from serving.shapes import draw_classification

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart" / "classifier.yaml"

# Each process's work: a run with frozen BatchNorm, a whole run with everything, and one that is cut and resumed.
DRIVER = """
import sys
import torch
from backbones import engine, train
from backbones.config import ClassifierConfig, load_config
from backbones.distributed import process_group

path, output, *overrides = sys.argv[1:]
frozen, everything = overrides[:overrides.index("--")], overrides[overrides.index("--") + 1:]

def run(name, *more):
    return train.run_train(load_config(ClassifierConfig, path, [*more, f"output={output}/{name}"]))

class Cut(Exception):
    pass

create_model, step, steps = train.create_model, engine.take_step, []

def cut(*args):
    steps.append(1)
    if len(steps) == 5:
        raise Cut
    step(*args)

with process_group(torch.device("cpu")):
    train.create_model = lambda *args, **settings: create_model(*args, **settings | {"batchnorm": "frozen"})
    run("frozen", *frozen)
    train.create_model = create_model
    run("whole", *everything)
    engine.take_step = cut
    try:
        run("cut", *everything)
        raise SystemExit("was not cut")
    except Cut:
        engine.take_step = step
    run("cut", *everything, "resume=true")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("shapes")
    draw_classification(root, {"train": 50, "val": 15}, seed=0, size=32)
    return [f"data.root={root}", "preprocess.resize=32", "preprocess.crop=32", "train.epochs=2"]


@pytest.fixture(scope="module")
def frozen(data) -> list[str]:
    # SGD: where a gradient is all but zero, AdamW makes a step of its rounding
    return [*data, "train.optimizer=sgd", "train.lr=0.01", "train.lr_batch=16"]


@pytest.fixture(scope="module")
def runs(data, frozen, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    everything = [
        *data, "data.batch_size=4", "train.accumulate=2", "train.ema=0.8", "train.mixup=0.2",
        "train.cutmix=1", "train.drop_path=0.2",
    ]  # fmt: skip
    (output / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(output / "driver.py"), str(CONFIG), str(output), *frozen, "data.batch_size=8", "--", *everything]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    (output / "stdout").write_text(done.stdout)
    return output


def test_two_processes_are_one_with_double_the_batch(frozen, runs, tmp_path, monkeypatch):
    create = train.create_model
    monkeypatch.setattr(
        train, "create_model", lambda *args, **settings: create(*args, **settings | {"batchnorm": "frozen"})
    )
    one = train.run_train(load_config(ClassifierConfig, CONFIG, [*frozen, "data.batch_size=16", f"output={tmp_path}"]))
    two = json.loads((runs / "frozen" / "history.json").read_text())
    assert [entry["lr"] for entry in two] == [entry["lr"] for entry in one["history"]]
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one["history"]], rel=1e-4)
    weights = [read_weights(folder / "last.safetensors")[0] for folder in (tmp_path, runs / "frozen")]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-3, atol=1e-5)


def test_two_processes_resume_exactly(runs):
    for name in ("last.safetensors", "best.safetensors", "history.json"):
        assert sha256(runs / "cut" / name) == sha256(runs / "whole" / name)


# Each process's work: what it hears of the others, and a run whose folder cannot be made.
SMALL = """
import sys
import torch
from backbones.checkpoint import Run
from backbones.config import ClassifierConfig, load_config
from backbones.distributed import gather, process_group, rank
from backbones.errors import InputError

with process_group(torch.device("cpu")):
    print(gather(rank()))
    model = torch.nn.Linear(1, 1)
    try:
        config = load_config(ClassifierConfig, sys.argv[1], [f"output={sys.argv[2]}"])
        Run(config, model, torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False), "top1", {})
    except InputError as error:
        print(error)
"""


def test_any_launcher_makes_a_group_and_a_mistake_is_everybodys(tmp_path):
    (tmp_path / "file").touch()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SMALL, str(CONFIG), str(tmp_path / "file" / "run")]
    processes = [
        subprocess.Popen(command, env=os.environ | variables | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        ranks, problem = process.communicate(timeout=100)[0].splitlines()
        assert ranks == "[0, 1]"
        assert "choose another place" in problem


def test_one_process_speaks(runs):
    said = (runs / "stdout").read_text()
    assert said.count("best top-1") == 3
    assert said.count("epoch 1/2: loss") == 3
    assert "images a step: 16 (batch 4 x accumulate 2 x 2 processes)" in said
