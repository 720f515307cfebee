"""The one command for all benchmarks, and its page, from made-up results of each part."""

import json
import re
import subprocess
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from backbones.errors import InputError
from benchmarks import __main__ as command
from benchmarks import machine, parts, roofline
from benchmarks.page import write_page
from benchmarks.parts import GPU_PARTS, PARTS, Part, about, run_parts
from benchmarks.stress import VICTIMS
from serving.sessions.providers import driver_problem


def turns(*names: str) -> dict:
    """Of contestants of whom the first is twice as fast as each other."""
    ours, *others = names
    return {
        "images_per_s": {ours: 20.0} | dict.fromkeys(others, 10.0),
        "ours_over": dict.fromkeys(others, 2.0), "spread": {name: [1.9, 2.1] for name in others},
    }  # fmt: skip


LOAD = {"requests_per_s": 100.0, "errors": 0, "p50_ms": 3.0, "p99_ms": 9.0}
SERVER = {"clients": {"1": LOAD, "8": LOAD}, "cold_start_s": 4.0, "memory_mb": 500.0}
BARE = {
    "loops": {"serial": 50.0, "overlapped": 60.0}, "bare_ms": 2.0, "saturated": LOAD, "one": LOAD, "share": 0.9,
    "extra_ms": 1.0, "beside": 55.0, "beside_ms": 2.1, "share_beside": 0.95, "extra_beside_ms": 0.9,
}  # fmt: skip
TASK = turns("ours", "torchvision") | {"ratios": {"time": 0.9, "gmacs": 1.0, "time_over_gmacs": 0.9}, "met": True}
KILLED = {"recovered_s": None, "lost": {"ReadError": 3}, "library": {}}
FORM = turns("batched", "list") | {"detections": 5, "shared": 5, "met": True}
NETWORK = {
    "params": 20.0, "gmacs": 3.0, "published": [{"by": "timm", "size": 256, "top1": 79.5, "gmacs": 4.0}],
    "speeds": [
        {"runtime": runtime, "batch": batch} | turns("m", "resnet50")
        for runtime in ("eager", "onnxruntime") for batch in (1, 8)
    ],
}  # fmt: skip
RESULTS = {
    "backbones": {"settings": {"size": 224}, "models": {"m": NETWORK}},
    "imagenet_eval": {"models": {"m": dict.fromkeys(("evaluation", "training"), turns("ours", "timm"))}},
    "detection": {"peer": {"b": {"training": TASK, "inference": TASK}}, "forms": {"fcos": FORM}},
    "coco_metric": {
        "settings": {"images": 10, "objects": 70, "detections": 5}, "seconds": {"fast": 1.0, "pycocotools": 9.0},
        "times_as_fast": 9.0, "largest_difference": 0.0,
    },
    "export": {
        "gflops": 100.0,
        "models": {"m": {
            "gmacs": 1.0, "plain": [], "operators": {"float": {"Conv": 0.9, "Add": 0.1}},
            "batches": {"1": turns("onnxruntime", "OpenVINO", "eager")},
        }},
    },
    "roofline": {
        "device": "cpu", "bytes_per_s": 1e10, "flops": {"fp32": 1e11},
        "networks": [{
            "model": "m", "batch": 8, "precision": "fp32", "images_per_s": {"eager": 5.0, "compiled": 8.0},
            "flops": 8e9, "bytes": 2e8, "least_s": 0.1,
        }],
    },
    "sweep": {"rows": [{"model": "m", "problem": "too large"}]},
    "serving": {"bare": {"m": [BARE]}, "peers": {"m": {"cspnet": [SERVER], "LitServe": [SERVER]}}},
    "stress": {"parts": {
        "soak": {"answers": 9, "failures": {"503": 2}, "memory_mb": [[10.0, 900.0]], "growth": 0.01, "broken": []},
        "kills": {
            "broken": ["replica: bare clients lost 9 requests, 0 begun later"],
            **{victim: KILLED for victim in VICTIMS},
        },
        "overload": {
            "usual_p50_s": 0.1, "accepted": 5, "accepted_p99_s": 1.0, "refused": 7, "refused_p99_s": 0.1, "broken": [],
        },
        "hostile": {"answers": {"bomb: 413": 4}, "memory_mb": [800.0, 810.0], "broken": []},
        "stop": {"took_s": 2.0, "left": [], "broken": []},
    }},
    "batch": {"models": {"m": {
        "images_per_s": {"loop, batch 1, 1 decoding": 20.0, "job, 1 actor": 19.0},
        "best_loop": "loop, batch 1, 1 decoding", "over_the_loop": {"job, 1 actor": 0.95},
        "over_the_loader": {"job, 1 actor": 1.2}, "spread": {"job, 1 actor": [0.8, 1.1]},
        "start_s": {"job, 1 actor": 6.0},
    }}},
    "batch_memory": {"jobs": [{
        "images": 100, "seconds": 9.0, "images_per_s": 30.0, "job_mib": 300, "largest_worker_mib": 200, "all_mib": 900,
    }]},
    "gpu": {"models": {"m": {
        "left_out": {"tensorrt int8": "no TensorRT"},
        "batches": {"1": turns("cuda fp32", "eager fp32"), "8": turns("cuda fp32", "eager fp32", "compiled fp32")},
    }}},
}  # fmt: skip
ALL = {name: part for name, part in (PARTS | GPU_PARTS).items() if part.module in RESULTS}


@pytest.fixture
def folder(tmp_path):
    """Of a run of all parts, of which one failed and one, too, left no figures."""
    runs = {
        name: {
            "command": ["python", "-m", f"benchmarks.{part.module}"], "quick": False, "date": "2026-01-31",
            "seconds": 10.0, "problem": "exit status 1" if name in ("sweep", "gpu_batch") else None,
            "about": about(part.module),
        }
        for name, part in ALL.items()
    }  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    (tmp_path / "machine.json").write_text(json.dumps(machine.machine() | {"gpus": []}))
    for name, part in ALL.items():
        if name != "gpu_batch":
            result = RESULTS[part.module] | {"versions": {"python": "3.11.0", "torch": "2.11.0"}}
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return tmp_path


def test_a_page_of_all_parts(folder):
    page = folder / "docs" / "page.md"
    write_page([folder], page)
    text = page.read_text()
    for part in ALL.values():
        assert f"\n### {part.title}\n" in text
    assert text.count("python -m benchmarks.") == len(ALL)  # each command, and none of the docstrings'
    assert text.count("**This part failed: exit status 1.**") == 2
    assert text.count("torch 2.11.0") == len(ALL) - 1
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, line, *rows = block.splitlines()
        assert set(line) <= set("|- ") and rows
        assert len({row.count("|") for row in (head, line, *rows)}) == 1, block
    pictures = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", text)
    files = {page.parent / path for _, path in pictures}
    assert len(files) == len(pictures) and files == set((page.parent / "pictures/benchmarks").iterdir())
    assert {re.sub("_.*", "", path.stem) for path in files} >= {"export", "serving", "batch", "detection", "gpu"}
    for file in files:
        assert ET.parse(file).getroot().tag.endswith("}svg")


def test_the_same_results_give_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        write_page([folder], tmp_path / name / "page.md")
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b")
    )
    assert first == second and len(first) > 10


def test_a_smoke_run_says_so(folder):
    runs = json.loads((folder / "runs.json").read_text())
    runs = {"coco_metric": runs["coco_metric"] | {"quick": True}}
    (folder / "runs.json").write_text(json.dumps(runs))
    write_page([folder], folder / "page.md")
    assert (folder / "page.md").read_text().count("**A smoke run") == 1


def test_folders_that_make_no_page(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, words in (([empty], "empty has no results"), ([folder, folder], "has backbones, as a folder before it")):
        with pytest.raises(InputError, match=words):
            write_page(given, tmp_path / "page.md")


def test_the_page_says_what_the_code_was_that_ran(folder):
    runs = json.loads((folder / "runs.json").read_text())
    runs["stress"]["about"] = "As it was then."
    (folder / "runs.json").write_text(json.dumps(runs))
    write_page([folder], folder / "page.md")
    assert "\nAs it was then.\n" in (folder / "page.md").read_text()


@pytest.fixture
def three(monkeypatch, tmp_path):
    """Parts that work, fail, and take too long; each a module of a folder that stands for `benchmarks`."""
    package = tmp_path / "package" / "benchmarks"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, code in (
        ("works", "import sys; open(sys.argv[-1], 'w').write('{}'); print(sys.argv)"),
        ("fails", "import sys; sys.exit(3)"),
        ("hangs", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"),
    ):
        (package / f"{name}.py").write_text(f'"""It {name}."""\n{code}')
    monkeypatch.setattr(parts, "HERE", package)
    monkeypatch.chdir(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return {
        "fails": Part("fails", "Fails"),
        "hangs": Part("hangs", "Hangs", limit_s=1 / parts.PATIENCE),
        "works": Part("works", "Works", ("--rounds", "5"), quick=("--rounds", "1")),
    }


def test_a_part_that_fails_does_not_stop_the_others(three, tmp_path, monkeypatch, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fails.json").write_text("{}")  # of an earlier run
    monkeypatch.setattr(command, "PARTS", three)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        command.main(["run", "--parts", *three, "--quick", "-o", str(tmp_path / "out")])
    assert stop.value.code == 1
    assert time.monotonic() - began < 30
    said = capfd.readouterr()
    assert said.err.splitlines()[-2:] == ["failed: fails: exit status 3", "failed: hangs: not done within 1 s"]
    assert "'--rounds', '1'" in said.out
    runs = parts.read_runs(tmp_path / "out")
    assert [run["problem"] for run in runs.values()] == ["exit status 3", "not done within 1 s", None]
    assert runs["works"]["command"] == ["python", "-m", "benchmarks.works", "--rounds", "1"]
    assert runs["works"]["about"] == "It works."
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"machine.json", "runs.json", "works.json"}


def test_a_later_run_keeps_the_other_parts(three, tmp_path):
    out = tmp_path / "out"
    assert run_parts({"fails": three["fails"]}, out, quick=True) == ["fails: exit status 3"]
    assert run_parts({"works": three["works"]}, out, quick=False, more={"works": ["--more", "1"]}) == []
    assert list(parts.read_runs(out)) == ["fails", "works"]
    assert parts.read_runs(out)["works"]["command"][-4:] == ["--rounds", "5", "--more", "1"]


def test_another_machines_folder_is_refused(three, tmp_path):
    out = tmp_path / "out"
    run_parts({"works": three["works"]}, out, quick=False)
    said = json.loads((out / "machine.json").read_text())
    (out / "machine.json").write_text(json.dumps(said | {"cpu": "another"}))
    with pytest.raises(InputError, match="another machine's results"):
        run_parts({"works": three["works"]}, out, quick=False)


def test_the_parts_are_there_and_take_their_arguments():
    root = Path(__file__).parents[1] / "benchmarks"
    for part in (PARTS | GPU_PARTS).values():
        options = set(re.findall(r'"(--[a-z-]+)"', (root / f"{part.module}.py").read_text()))
        assert {word for word in (*part.arguments, *part.quick) if word.startswith("--")} <= options, part
        assert "--json" in options


def test_the_gpus_parts_take_less_than_nine_minutes():
    assert sum(part.limit_s for part in GPU_PARTS.values()) + parts.GRACE_S < 9 * 60


@pytest.mark.skipif(driver_problem() is None, reason="there is CUDA")
def test_without_cuda_it_says_so_in_a_line(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
    done = subprocess.run([script, "-o", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no CUDA device here: ") and "--dry" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ("gpu_artefacts", "gpu_roofline"))
def test_the_gpus_parts_on_a_cpu(name, tmp_path):
    assert run_parts({name: GPU_PARTS[name]}, tmp_path, quick=True) == []
    write_page([tmp_path], tmp_path / "page.md")
    assert "cspresnet10" in (tmp_path / "page.md").read_text()


def test_a_networks_least_time():
    """Of a layer that computes and one that moves, at 10 FLOP/s and 4 bytes/s."""
    network = [roofline.Layer(macs=50, moved=1, weights=1), roofline.Layer(macs=0, moved=8, weights=0)]
    roof = {"flops": {"fp32": 10.0}, "bytes_per_s": 4.0}
    one, two = (roofline.bounds(network, batch, 4, roof, "fp32") for batch in (1, 2))
    assert one == {"flops": 100, "bytes": 40, "least_s": 10 + 8}
    assert two == {"flops": 200, "bytes": 76, "least_s": 20 + 16}


def test_layers_of_a_network_are_counted_as_the_profile_counts():
    from backbones.profile import profile

    found = roofline.layers("cspresnet10", 64)
    assert 2 * sum(layer.macs for layer in found) == pytest.approx(profile("cspresnet10", 64).bflops * 1e9)
    params = profile("cspresnet10", 64).params * 1e6
    assert 0.95 * params < sum(layer.weights for layer in found) < params  # the rest are norms'
