"""What `python -m benchmarks` runs, one part after the other, each in a process of its own."""

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from backbones.errors import InputError
from backbones.files import read_json, write_json
from benchmarks.machine import machine

HERE = Path(__file__).parent
GRACE_S = 10  # between SIGTERM and SIGKILL
PATIENCE = 10  # times the limit, for a smoke run: it may be on any machine


@dataclass(frozen=True)
class Part:
    """A benchmark, `python -m benchmarks.<module>`; `limit_s` is the time that it may take."""

    module: str
    title: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()  # in place of `arguments`, for a smoke run
    limit_s: float | None = None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PARTS = {
    "backbones": Part(
        "backbones", "Backbones", _words("--rounds 3"),
        quick=_words("--models cspresnet50 resnet50 --rounds 1 --no-compile"),
    ),
    "imagenet": Part(
        "imagenet_eval", "ImageNet evaluation and training", _words("--rounds 3"),
        quick=_words("--models cspresnet50 --images 8 --rounds 1"),
    ),
    "detection": Part(
        "detection", "Detectors", _words("--size 384 --rounds 3"),
        quick=_words("--models cspresnet10 --size 128 --batch-size 1 --rounds 1"),
    ),
    "coco_metric": Part(
        "coco_metric", "COCO's metric", _words("--rounds 1"),
        quick=_words("--images 100 --objects 700 --detections 20 --rounds 1"),
    ),
    "export": Part(
        "export", "Artefacts", _words("--rounds 3"), quick=_words("--models cspresnet10 --rounds 1 --no-compile")
    ),
    "roofline": Part(
        "roofline", "Roofline", _words("--batch-sizes 1 8"),
        quick=_words("--models cspresnet10 --batch-sizes 1 --rounds 1 --no-compile"),
    ),
    "sweep": Part("sweep", "Export of every network", quick=_words("cspresnet10 fcos_cspresnet10_fpn")),
    "serving": Part(
        "serving", "The service", _words("--rounds 2"),
        quick=_words("--rounds 1 --seconds 1 --models cspresnet50 --peer-models nothing --peers"),
    ),
    "stress": Part("stress", "The service under stress", _words("--minutes 10"), quick=_words("--parts overload stop")),
    "batch": Part(
        "batch", "The batch job", _words("--models cspresnet50 fcos_cspresnet10_fpn --images 192 --rounds 3"),
        quick=_words("--models cspresnet50 --images 64 --rounds 1 --actors 1"),
    ),
    "batch_memory": Part("batch_memory", "The batch job's memory", quick=_words("--images 200 400")),
}  # fmt: skip

# What a CUDA machine changes: their limits add up to less than nine minutes. `quick` is of a machine without one.
GPU_PARTS = {
    "gpu_serving": Part(
        "serving", "The service on the GPU",
        _words("--parts bare --models cspresnet50 --rounds 1 --seconds 3 --provider cuda --replicas 4"),
        _words("--parts bare --models cspresnet50 --rounds 1 --seconds 1"), 105,
    ),
    "gpu_batch": Part(
        "batch", "The batch job on the GPU",
        _words("--models cspresnet50 --rounds 1 --actors 1 --images 2048 --provider cuda"),
        _words("--models cspresnet50 --rounds 1 --actors 1 --images 64"), 90,
    ),
    "gpu_detector": Part(
        "gpu", "A detector's artefact on the GPU",
        _words(
            "--models fcos_cspresnet50_fpn --batch-sizes 1 8 --rounds 2 --providers cuda --precisions fp32 --no-compile"
        ),
        _words("--models fcos_cspresnet10_fpn --batch-sizes 1 --rounds 1 --providers cpu --device cpu --no-compile"),
        70,
    ),
    "gpu_roofline": Part(
        "roofline", "Roofline of the GPU",
        _words("--models cspresnet50 cspdarknet50 --device cuda --rounds 2 --no-compile"),
        _words("--models cspresnet10 --batch-sizes 1 --rounds 1 --device cpu --no-compile"), 55,
    ),
    "gpu_detection": Part(
        "detection", "Detectors on the GPU", _words("--models cspresnet50 --device cuda --rounds 2"),
        _words("--models cspresnet10 --size 128 --batch-size 1 --rounds 1 --device cpu"), 45,
    ),
    "gpu_artefacts": Part(
        "gpu", "A classifier's artefacts on the GPU", _words("--models cspresnet50 --batch-sizes 1 8 64 --rounds 2"),
        _words("--models cspresnet10 --batch-sizes 1 --rounds 1 --providers cpu --device cpu --no-compile"), 155,
    ),
}  # fmt: skip


def run_parts(
    parts: Mapping[str, Part], folder: Path, quick: bool, more: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Run them into `folder`: `<part>.json` each, `machine.json`, and `runs.json` of commands and what became of them.

    Args:
        more: arguments of a part, after its own.

    Returns:
        What is to be said of each part that failed.

    Raises:
        InputError: the folder has results of another machine.
    """
    here, known = machine(), folder / "machine.json"
    if known.exists() and read_json(known) != here:
        raise InputError(f"-o {folder} holds another machine's results: choose another folder")
    write_json(known, here)
    runs: dict[str, Any] = read_runs(folder)
    failed = []
    for name, part in parts.items():
        result = folder / f"{name}.json"
        result.unlink(missing_ok=True)
        command = ["-m", f"benchmarks.{part.module}", *(part.quick if quick else part.arguments)]
        command += (more or {}).get(name, ())
        print(f"== {name}: python {' '.join(command)}", flush=True)
        began = time.monotonic()
        limit_s = part.limit_s and part.limit_s * (PATIENCE if quick else 1)
        problem = _run([sys.executable, *command, "--json", str(result)], limit_s)
        runs[name] = {
            "command": ["python", *command], "quick": quick, "date": date.today().isoformat(),
            "seconds": round(time.monotonic() - began, 1), "problem": problem, "about": about(part.module),
        }  # fmt: skip
        write_json(folder / "runs.json", runs)
        if problem:
            failed.append(f"{name}: {problem}")
    return failed


def about(module: str) -> str:
    """What a part's module says of itself, but for how it is called."""
    said = ast.get_docstring(ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8")))
    assert said is not None
    return "\n\n".join(text for text in said.split("\n\n") if "python -m benchmarks." not in text)


def read_runs(folder: Path) -> dict[str, Any]:
    """By part, its `command`, `quick`, `date`, `seconds`, `problem`, which is null or why it failed, and what the code
    that ran was `about`.
    """
    path = folder / "runs.json"
    runs: dict[str, Any] = read_json(path) if path.exists() else {}
    return runs


def _run(command: Sequence[str], limit_s: float | None) -> str | None:
    """Why the command failed, if it did. At its end, or ours, nothing that it started in its group is left."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit_s)
        return f"exit status {status}" if status else None
    except subprocess.TimeoutExpired:
        return f"not done within {limit_s:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
