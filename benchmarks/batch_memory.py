"""The memory of a batch job, over the number of its images.

    python -m benchmarks.batch_memory [--images 2000 20000] [--json FILE]

Draws small JPEG files, every hundredth of them broken, predicts them with a tiny classifier in a job of its own,
and adds up what that process and all that it starts hold (PSS of Linux: shared pages are counted once). It fails if the
counts are not exact or an image is missing or twice. A job that held names or results would grow with the images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from backbones.cli import at_least
from backbones.errors import exit_on_input_error
from backbones.files import versions, write_json
from benchmarks.contest import table
from benchmarks.export import random_classifier
from benchmarks.processes import pss_mb, tree
from serving.export import run_export
from serving.jobs.results import iter_rows

SIZE = (64, 48)
BROKEN = 100  # one in so many


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=at_least(BROKEN), default=(2000, 20000))
    parser.add_argument("--actors", type=at_least(1), default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"settings": vars(args) | {"json": None}, "versions": versions("ray"), "jobs": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        random_classifier("cspresnet10", root / "w.safetensors")
        run_export(str(root / "w.safetensors"), root / "m.onnx")
        for count in args.images:
            draw(root / str(count), count)
            result["jobs"].append({"images": count} | watch(root, count, args.actors))
            print(json.dumps(result["jobs"][-1]), flush=True)
    print(markdown(result))
    if args.json:
        write_json(args.json, result)


def draw(folder: Path, count: int) -> None:
    """A hundred files a folder; each differs in its bytes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i // 100:05d}" / f"{i:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), np.uint8)).resize(SIZE).save(path)
        if i % BROKEN == 0:
            path.write_bytes(path.read_bytes()[:200])


def watch(root: Path, count: int, actors: int) -> dict[str, Any]:
    """Run the job, and look at its processes twice a second."""
    output = root / f"{count}-out"
    (root / "job.yaml").write_text(
        f"input: {root / str(count)}\noutput: {output}\nactors: {{min_actors: {actors}}}\n"
        f"models: [{{name: m, artifact: {root / 'm.onnx'}}}]\n"
    )
    start = time.perf_counter()
    job = subprocess.Popen([sys.executable, "-m", "serving", "batch", str(root / "job.yaml")])
    peaks = dict.fromkeys(("job_mib", "largest_worker_mib", "all_mib"), 0.0)
    while job.poll() is None:
        held = {process.pid: pss_mb(process.pid) for process in tree(job.pid)}
        seen = (held.get(job.pid, 0), max(held.values(), default=0), sum(held.values()))
        peaks = {name: max(peaks[name], value) for name, value in zip(peaks, seen, strict=True)}
        time.sleep(0.5)
    assert job.returncode == 0, f"the job ended with {job.returncode}"
    rows = [(row.path, row.error is not None) for row in iter_rows(output / "m")]
    wanted = [(f"{i // 100:05d}/{i:07d}.jpg", i % BROKEN == 0) for i in range(count)]
    assert rows == wanted, "images are missing, twice, or wrongly said to be broken"
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["images"], summary["errors"]) == (count, len(range(0, count, BROKEN))), summary
    return {"seconds": time.perf_counter() - start, "images_per_s": summary["images_per_s"], **peaks}


def markdown(result: dict[str, Any]) -> str:
    """A row a job; memory in MiB."""
    head = ["images", "s", "images/s", "the job", "its largest process", "all processes"]
    keys = ("seconds", "images_per_s", "job_mib", "largest_worker_mib", "all_mib")
    rows = [[str(job["images"]), *(f"{job[key]:.0f}" for key in keys)] for job in result["jobs"]]
    return "\n".join(table(head, rows))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
