"""Evaluation: each image once, in one process or many and whatever memory holds; a CSV that is gone on with."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import backbones.compare
import backbones.evaluate
from backbones.__main__ import main
from backbones.compare import configs_of
from backbones.config import ClassifierConfig, load_config
from backbones.cspnet import create_model
from backbones.engine import evaluate, predict
from backbones.errors import InputError
from backbones.evaluate import published, run_eval
from backbones.imagenet import ImageNet
from backbones.memory import in_parts
from backbones.preprocess import ClassifierPreprocess
from backbones.published import RELEASES, protocol
from backbones.samples import Sample
from backbones.summary import describe, headline, summary

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "imagenet" / "cspresnet50.yaml"
SMALL = ClassifierPreprocess(resize=36, crop=32)
REPORT = {"eval.json", "per_class.csv", "predictions.csv", "confusion.png", "reliability.png", "mistakes.jpg"}


def draw(root: Path, count: int, classes=("n01440764", "n02102040", "n03888257")) -> Path:
    """`count` images of noise in `root`/val, dealt out to the classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / "val" / classes[i % len(classes)] / f"ILSVRC2012_val_{i + 1:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)).save(path)
    return root


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    return [
        str(CONFIG), f"data.root={data}", "weights=null", "model=cspresnet10", f"output={output}", "data.workers=0",
        "data.batch_size=4", "preprocess.resize=36", "preprocess.crop=32", "device=cpu", *more,
    ]  # fmt: skip


def config(data: Path, output: Path, *more: str) -> ClassifierConfig:
    path, *overrides = arguments(data, output, *more)
    return load_config(ClassifierConfig, path, overrides)


def read(folder: Path) -> tuple[dict, list[dict[str, str]]]:
    with open(folder / "predictions.csv", newline="") as file:
        return json.loads((folder / "eval.json").read_text()), list(csv.DictReader(file))


def dataset(root: Path, **settings) -> ImageNet:
    paths = sorted(root.rglob("*.png"))
    return ImageNet([Sample(str(path), i % 3, path) for i, path in enumerate(paths)], SMALL, **settings)


class MeanColor(nn.Module):
    """Logits are an image's mean colour. Memory holds `room` images."""

    def __init__(self, room: int = 1000, error: Exception | None = None):
        super().__init__()
        self.scale, self.room, self.error, self.sizes = nn.Parameter(torch.ones(1)), room, error, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.room:
            raise self.error
        self.sizes.append(len(x))
        return x.double().mean((2, 3)).float() * self.scale


@pytest.mark.parametrize("before", (("medium", True), ("highest", False)))
def test_float32_is_float32_on_a_gpu_too(tmp_path, before) -> None:
    """What a run asked for elsewhere is as it was, after it."""

    def now() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def change(matrices: str, convolutions: bool) -> None:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions

    class Watching(MeanColor):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(now())
            return super().forward(x)

    kept, seen = now(), []
    try:
        change(*before)
        predict(Watching(), dataset(draw(tmp_path, 2)), batch_size=2, workers=0)
        assert (seen, now()) == ([("highest", False)], before)
    finally:
        change(*kept)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_when_memory_runs_out_batches_are_halved_and_nothing_is_lost(tmp_path, capsys, error):
    images = dataset(draw(tmp_path, 19))
    expected = predict(MeanColor(), images, batch_size=8, workers=0)
    model = MeanColor(3, error)
    found = predict(model, images, batch_size=8, workers=0)
    assert found.indices.tolist() == list(range(19))
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert model.sizes == [2, 2, 2, 2] * 2 + [2, 1]  # 8, then 4, then 2, which stays
    assert (expected.batch_size, found.batch_size) == (8, 2)
    assert capsys.readouterr().out == "memory does not hold 8 images at once: going on with 2\n"
    with pytest.raises(InputError, match="memory does not hold one image .*: give device=cpu") as raised:
        predict(MeanColor(0, error), images, batch_size=8, workers=0)
    assert str(error) in str(raised.value)


def test_other_errors_are_no_lack_of_memory():
    def broken(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        in_parts(broken, torch.zeros(4), 4)


def test_skipped_images_are_counted_and_named(tmp_path):
    data = draw(tmp_path / "data", 7)
    broken = sorted(data.rglob("*.png"))[4]
    broken.write_bytes(b"broken")
    result = run_eval(config(data, tmp_path / "run", "data.on_error=skip"))
    assert (result["images"], result["skipped"], result["skipped_files"]) == (6, 1, [str(broken)])
    assert "1 skipped" in summary(result)
    assert str(broken) not in {row["file"] for row in read(tmp_path / "run")[1]}
    with pytest.raises(InputError, match=broken.name):
        run_eval(config(data, tmp_path / "stopped"))
    assert not list((tmp_path / "stopped").iterdir())
    for path in data.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the 7 images can be decoded"):
        run_eval(config(data, tmp_path / "none", "data.on_error=skip"))


def test_report_agrees_with_the_model_by_hand(tmp_path):
    data = draw(tmp_path / "data", 7)
    real = [[0], [], [5, 701], [0], [217], [701], [0, 217, 701]]
    (tmp_path / "real.json").write_text(json.dumps(real))
    more = [f"data.real_labels={tmp_path / 'real.json'}", "preprocess.interpolation=bilinear"]
    result = run_eval(config(data, tmp_path / "run", *more))
    assert {path.name for path in (tmp_path / "run").iterdir()} == REPORT
    written, table = read(tmp_path / "run")
    assert written == json.loads(json.dumps(result))
    assert (written["classes"], written["images"], written["skipped"]) == ("3 of 1000", 7, 0)
    assert written["protocol"] == describe(ClassifierPreprocess(resize=36, crop=32, interpolation="bilinear"))
    assert written["published"] == []

    torch.manual_seed(0)
    model = create_model("cspresnet10").eval()
    images = [np.asarray(Image.open(row["file"]).resize((39, 36), Image.Resampling.BILINEAR)) for row in table]
    pixels = torch.from_numpy(np.stack(images)[:, 2:34, 4:36]).float() / 255
    batch = (pixels - torch.tensor(protocol("cspresnet10").mean)) / torch.tensor(protocol("cspresnet10").std)
    with torch.inference_mode():
        best = model(batch.permute(0, 3, 1, 2)).softmax(1).max(1)
    names = backbones.evaluate.list_samples(config(data, tmp_path).data, "val", 1000)[1]
    assert [row["predicted_1"] for row in table] == [names[i] for i in best.indices]
    np.testing.assert_allclose([float(row["confidence"]) for row in table], best.values, atol=1e-5)
    truth = [row["target"] for row in table]
    assert written["top1"] == np.mean([row["predicted_1"] == name for row, name in zip(table, truth, strict=True)])
    numbers = [int(row["file"][-6:-4]) - 1 for row in table]
    hits = [int(i) in real[n] for i, n in zip(best.indices, numbers, strict=True) if real[n]]
    assert written["real"] == {"top1": np.mean(hits), "images": 6, "without_label": 1}


def test_evaluate_is_the_same_in_half_precision_and_other_layouts(tmp_path):
    images = dataset(draw(tmp_path, 6))
    model = create_model("cspresnet10", 3)
    expected = predict(model, images, batch_size=4, workers=0)
    found = predict(model, images, batch_size=4, workers=0, channels_last=True)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
    half = predict(model, images, batch_size=4, workers=0, amp=True)
    assert half.logits.dtype == np.float32
    assert 0 < np.abs(half.logits - expected.logits).max() < 0.1 * np.abs(expected.logits).max()
    result = evaluate(model, images, ["a", "b", "c"], batch_size=4, workers=0)
    assert (result["images"], result["skipped"], set(result["per_class"])) == (6, 0, {"a", "b", "c"})


def test_published_figures_are_of_the_same_weights_and_protocol(tmp_path):
    settings = load_config(ClassifierConfig, CONFIG)
    assert published(settings) == [{"by": "timm", "top1": 0.79578, "top5": 0.94698, "images": 50000}]
    for override in ("weights=null", "preprocess.crop=224", "model=cspresnet10"):
        assert published(load_config(ClassifierConfig, CONFIG, [override])) == []
    settings = load_config(ClassifierConfig, CONFIG, ["preprocess.interpolation=bicubic"])
    assert [figure["by"] for figure in published(settings)] == ["mmpretrain"]
    settings = load_config(ClassifierConfig, CONFIG, ["ignore_head=true"])
    assert published(settings) == []  # of a random head
    assert "weights timm with a random head, as ignore_head=true asks (seed 0): " in headline(settings)


def test_a_protocol_that_no_published_figure_has_is_said():
    shares: dict = {"top1": 0.5, "top5": 0.5, "images": 2, "per_class": {}, "model": "cspresnet50", "published": []}
    line = summary(shares | {"weights": "timm", "ignore_head": False})
    assert line.endswith(
        "; no published figure under this protocol; timm's is 79.578, 94.698 under resize 288 bilinear, "
        "centre crop 256, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    )
    for values in ({"weights": "mine.safetensors", "ignore_head": False}, {"weights": "timm", "ignore_head": True}):
        assert "published" not in summary(shares | values)


def test_a_report_that_is_not_whole_has_no_eval_json(tmp_path, monkeypatch):
    settings = config(draw(tmp_path / "data", 3), tmp_path / "run")
    run_eval(settings)
    with monkeypatch.context() as patch:
        patch.setattr("backbones.evaluate.predict", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_eval(settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} == REPORT  # the earlier one, untouched
    monkeypatch.setattr("backbones.report.reliability", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_eval(settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} == REPORT - {"eval.json"}


@pytest.mark.parametrize("root", [None, "/nowhere"])
def test_missing_data_is_said_before_weights_are_downloaded(tmp_path, monkeypatch, root):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("downloads"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    data = "null" if root is None else root
    with pytest.raises(InputError, match=r"data\.root"):
        run_eval(config(Path("/"), tmp_path, f"data.root={data}", "weights=timm", "model=cspresnet50"))


def test_each_model_has_its_own_protocol_unless_the_command_names_one():
    own = {config.model: config.preprocess for config in configs_of(CONFIG, [], ["all"])}
    assert own == {name: release.figures[0].preprocess for name, release in RELEASES.items()}
    assert len(set(map(str, own.values()))) > 1
    configs = configs_of(CONFIG, ["preprocess.crop=200", "output=x"], ["darknet53", "cspdarknet53", "cspdarknet50"])
    assert [(config.model, config.preprocess.crop) for config in configs] == [("darknet53", 200), ("cspdarknet50", 200)]
    assert [config.output for config in configs] == ["x/darknet53", "x/cspdarknet50"]
    with pytest.raises(InputError, match="did you mean 'darknet53'"):
        configs_of(CONFIG, [], ["darknet35"])


def many(data: Path, folder: Path, *names: str, more=()) -> list[str]:
    path, *overrides = arguments(data, folder / "run", *more)
    return ["eval", path, "--csv", str(folder / "results.csv"), "--models", *names, *overrides]


def test_csv_over_models_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    data, path = draw(tmp_path / "data", 3), tmp_path / "results.csv"
    ran: list[str] = []
    failures: list[Exception] = []

    def fail_at_darknet(config, device):
        ran.append(config.model)
        if config.model == "cspdarknet10" and failures:
            raise failures.pop()
        return run_eval(config, device)

    monkeypatch.setattr(backbones.compare, "run_eval", fail_at_darknet)
    names = ["cspresnet10", "cspdarknet10", "cspresnext10"]
    for failure, status in ((KeyError("a mistake of ours"), 1), (InputError("bad weights"), 2)):
        ran.clear()
        failures.append(failure)
        path.unlink(missing_ok=True)
        with pytest.raises(SystemExit) as stop:
            main(many(data, tmp_path, *names))
        assert (stop.value.code, ran) == (status, names)  # the others still ran
        assert "error: cspdarknet10: " in capsys.readouterr().err.splitlines()[-1]
    main(many(data, tmp_path, *names))
    assert ran == [*names, "cspdarknet10"]  # only what was not there
    assert f"cspresnet10: already in {path}" in capsys.readouterr().out
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["cspresnet10", "cspresnext10", "cspdarknet10"]
    for row in rows:
        result = read(tmp_path / "run" / row["model"])[0]
        assert (float(row["top1"]), int(row["images"]), row["skipped"]) == (result["top1"], 3, "0")
        assert row["protocol"] == result["protocol"]
    main(many(data, tmp_path, "cspresnet10", more=["seed=1"]))  # another network, another row
    main(many(data, tmp_path, "cspresnet10", more=["data.batch_size=2", "data.workers=1"]))  # the same figures
    assert ran[-1:] == ["cspresnet10"] and len(ran) == 5


def test_csv_of_something_else_is_not_written_over(tmp_path):
    (tmp_path / "results.csv").write_text("name,value\na,1\n")
    with pytest.raises(SystemExit) as stop:
        main(many(draw(tmp_path / "data", 3), tmp_path, "cspresnet10"))
    assert stop.value.code == 2
    assert (tmp_path / "results.csv").read_text() == "name,value\na,1\n"
    with pytest.raises(SystemExit):
        main(["eval", str(CONFIG), "--models", "all"])


def test_what_changes_the_figures_makes_another_row(tmp_path):
    def key(*overrides: str) -> tuple[str, ...]:
        settings = config(tmp_path, tmp_path, *overrides)
        return backbones.compare._key(backbones.compare._identity(settings, settings.weights))

    weights = "weights=timm"
    changes = ["ignore_head=true", "channels_last=true", "amp=true", "preprocess.crop=30", "data.decoder=opencv"]
    keys = [key(), key("seed=1"), key(weights), *(key(weights, change) for change in changes)]
    assert len(set(keys)) == len(keys)
    assert key(weights, "seed=1") == key(weights)  # nothing is random
    assert key(weights, "seed=1", "ignore_head=true") != key(weights, "ignore_head=true")
    assert key("data.workers=1", "data.batch_size=1", "output=x") == key()


DRIVER = """
import json, os, sys
import torch
from backbones.__main__ import main
from backbones.distributed import process_group
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])  # machines without a common disk
with process_group(torch.device("cpu")):
    for words in json.loads(sys.argv[1]):
        try:
            main(["eval", *words])
        except SystemExit as stop:
            os.write(1, f"left with {stop.code}\\n".encode())  # at once, for the two print side by side
"""


def two_processes(folder: Path, *runs: list[str]) -> subprocess.CompletedProcess[str]:
    """Several `eval` commands under one torchrun, whose start takes longest."""
    (folder / "driver.py").write_text(DRIVER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, str(folder / "driver.py"), json.dumps(runs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path):
    data = draw(tmp_path / "data", 7)
    broken = sorted(data.rglob("*.png"))[3]
    broken.write_bytes(b"broken")
    skip = "data.on_error=skip"
    run_eval(config(data, tmp_path / "one", skip))
    csv_run = many(data, tmp_path, "cspresnet10", "cspdarknet10", more=[skip])[1:]
    csv_run[csv_run.index("--csv") + 1] = "results.csv"  # which the main process alone will have
    draw(tmp_path / "0" / "mine", 3)
    done = two_processes(
        tmp_path, arguments(data, tmp_path / "two", skip), arguments(data, tmp_path / "stopped"), csv_run, csv_run,
        arguments(Path("mine"), tmp_path / "stopped"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (one, alone), (two, together) = read(tmp_path / "one"), read(tmp_path / "two")
    assert (one["processes"], two["processes"], two["images"]) == (1, 2, 6)
    for key in ("top1", "top5", "images", "skipped", "skipped_files", "per_class"):
        assert one[key] == two[key], key
    assert two["ece"] == pytest.approx(one["ece"], abs=1e-6)
    confidences = [[float(row.pop("confidence")) for row in table] for table in (alone, together)]
    assert alone == together
    np.testing.assert_allclose(*confidences, atol=1e-5)

    # One process met the broken image, one has no data; both stop, and say which it is.
    assert done.stdout.count("left with 2") == 4, (done.stdout, done.stderr)
    assert f"error: {broken}" in done.stderr
    assert done.stderr.count("error: data.root=mine is no folder") == 2
    assert not list((tmp_path / "stopped").iterdir())

    assert done.stdout.count("top-1") == 3  # the one run and the two models', each printed by one process
    assert done.stdout.count("already in") == 2
    assert not (tmp_path / "1" / "results.csv").exists()
    with open(tmp_path / "0" / "results.csv", newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["cspresnet10", "cspdarknet10"]
