"""The batch job beside onnxruntime loops without Ray over the same files.

    python -m benchmarks.batch [--models cspresnet50 …] [--images 512] [--rounds 3] [--seconds 8] [--actors 1 2]
        [--json FILE]

Side by side in one run: in every round the loops and the job have their turns on the same JPEG files, another first in
each, and the ratios are medians over the rounds. The loops are one process without Ray, which each job starts and ends:
one image after the other; threads that decode ahead of batches of 1 or 8; or a thread a core that does all of an image
in a session of one thread. The job is held against the best of these, and against the best of PyTorch's DataLoader,
whose workers decode for a session on all cores in batches of 8. All sessions have the job's settings. A loop has
`--seconds`; the DataLoader's speed is of the images after the first batch, the job's of all images, from the begin of
the first to the end of the last: what comes before, the start of Ray and of the actors, or of the workers, does not
grow with the images, and is stated in seconds. Two actors have half of the cores each.

The stages are measured on the way: what one core needs to read, decode and resize an image, to run it, and to write its
row; on a GPU, what that needs to run it. docs/batch.md computes from these what a cluster does.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from backbones.cli import at_least
from backbones.errors import exit_on_input_error
from backbones.files import list_images, versions, write_json
from benchmarks import bare
from benchmarks.contest import table, with_spread
from benchmarks.export import random_classifier, random_detector
from detection.names import is_detector
from serving.artifact import Artifact, read_whole
from serving.batch import run_batch
from serving.export import run_export
from serving.jobs.config import BatchConfig
from serving.jobs.inputs import File
from serving.jobs.parts import Output
from serving.jobs.results import to_table
from serving.jobs.worker import predict_files
from serving.predictor import create_predictor, prepare
from serving.runtime import OnnxModel, Provider, usable_cores
from serving.sessions.providers import ON_GPU
from serving.shapes import background

MODELS = ("cspresnet50", "fcos_cspresnet50_fpn")
SIZE = (500, 375)  # of the drawn files, pixels: ImageNet's mean
BATCH = 8
WORKERS = tuple(sorted({1, usable_cores()}))  # of the DataLoader
PEERS = ("loop", "DataLoader")  # how their names begin
SETTLE_S = 3  # until Ray's processes are gone


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--images", type=at_least(64), default=512, help="of a job")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--seconds", type=at_least(1), default=8, help="of a loop's turn")
    parser.add_argument("--actors", nargs="+", type=at_least(1), default=(1, 2))
    parser.add_argument("--decode", nargs="+", choices=("actors", "tasks"), default=("actors",))
    parser.add_argument("--provider", choices=("cpu", *ON_GPU), default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    result: dict[str, Any] = {
        "cores": usable_cores(), "settings": vars(args) | {"json": None},
        "versions": versions("ray", "onnxruntime-gpu", "pillow", "pyarrow"), "models": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root / "images", args.images)
        for name in args.models:
            result["models"][name] = race(name, root, args)
            print(json.dumps({name: result["models"][name]}, indent=1), flush=True)
    print(markdown(result))
    if args.json:
        write_json(args.json, result)


def draw(folder: Path, count: int) -> None:
    """JPEG files with as much detail as photographs have: about 100 KB each."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    pictures = [background(rng, *SIZE) for _ in range(16)]
    for i in range(count):
        pictures[i % 16].rotate(180 * (i % 2)).save(folder / f"{i:06d}.jpg", quality=92)


def race(name: str, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Every contestant's images a second in every round, the ratios of their medians, and the stages."""
    artifact = root / f"{name}.onnx"
    build = random_detector if is_detector(name) else random_classifier
    build(name, root / "w.safetensors")
    run_export(str(root / "w.safetensors"), artifact)
    paths = list_images(root / "images")
    said = read_whole(artifact).artifact
    turns: dict[str, Callable[[], tuple[float, float | None]]] = {}
    for kind, loop in bare.loops(artifact, paths, args.provider).items():
        turns[f"loop, {kind}"] = partial(run_loop, loop, args.seconds)
    for workers in WORKERS:
        key = f"DataLoader, {workers} worker{'s' if workers > 1 else ''}"
        turns[key] = partial(data_loader, artifact, said, paths, workers, args.provider)
    for decode, actors in itertools.product(args.decode, args.actors):
        key = f"job, {actors} actor{'s' if actors > 1 else ''}, decode in {decode}"
        turns[key] = partial(run_job, artifact, root, decode, actors, args.provider)
    speeds: dict[str, list[float]] = {key: [] for key in turns}
    starts: dict[str, list[float]] = {}
    for turn in range(args.rounds):
        keys, first = list(turns), turn * len(turns) // args.rounds
        for key in keys[first:] + keys[:first]:
            speed, start = turns[key]()
            speeds[key].append(speed)
            if start is not None:
                starts.setdefault(key, []).append(start)
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    best, loader = (max((k for k in medians if k.startswith(kind)), key=medians.__getitem__) for kind in PEERS)
    ratios = {key: over(values, speeds[best]) for key, values in speeds.items()}
    return {
        "images_per_s": medians, "best_loop": best, "best_loader": loader,
        "over_the_loop": {key: statistics.median(ratios[key]) for key in starts},
        "over_the_loader": {key: statistics.median(over(speeds[key], speeds[loader])) for key in starts},
        "spread": {key: [min(ratios[key]), max(ratios[key])] for key in starts},
        "start_s": {key: statistics.median(values) for key, values in starts.items()},
        "stages_ms": stages(artifact, paths[: 8 * BATCH], root / f"{name}-stages", args.provider),
    }  # fmt: skip


def over(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratio of each round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def run_loop(loop: bare.Loop, seconds: float) -> tuple[float, None]:
    """Images a second; it needs no start."""
    return loop(seconds), None


class Prepared(Dataset[Any]):
    """Images as the artefact's predictor takes them."""

    def __init__(self, paths: Sequence[Path], said: Artifact):
        self.paths, self.said = paths, said

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return prepare(self.paths[index], self.said)


def data_loader(
    path: Path, said: Artifact, paths: Sequence[Path], workers: int, provider: Provider
) -> tuple[float, float]:
    """Images a second after the first batch, and seconds until that was run."""
    model = OnnxModel(path, provider, usable_cores())
    predictor = create_predictor(model)  # for the form of its inputs

    def collate(prepared: list[Any]) -> dict[str, torch.Tensor]:  # tensors travel in shared memory
        return {name: torch.from_numpy(value) for name, value in predictor.inputs(prepared).items()}

    began, start, images, kept = time.perf_counter(), 0.0, 0, []
    loader = DataLoader(
        Prepared(paths, said), BATCH, num_workers=workers, collate_fn=collate, multiprocessing_context="fork"
    )
    for inputs in loader:
        kept.append(model.run(**{name: value.numpy() for name, value in inputs.items()}))
        if not start:
            start = time.perf_counter()
        else:
            images += len(inputs["images"])
    return images / (time.perf_counter() - start), start - began


def run_job(artifact: Path, root: Path, decode: str, actors: int, provider: Provider) -> tuple[float, float]:
    """Images a second from the first chunk's begin to the last one's end, and seconds until that begin."""
    config = BatchConfig.model_validate({
        "input": str(root / "images"), "output": tempfile.mkdtemp(dir=root), "decode": decode, "batch_size": BATCH,
        "actors": {"min_actors": actors, "num_gpus": 1 / actors if provider in ON_GPU else 0},
        "models": [{"name": "m", "artifact": str(artifact), "provider": provider}],
    })  # fmt: skip
    summary = run_batch(config)
    time.sleep(SETTLE_S)
    return summary["images_per_s"], summary["start_s"]


def stages(artifact: Path, paths: Sequence[Path], folder: Path, provider: Provider) -> dict[str, float]:
    """Milliseconds an image: of one core to decode it, to run it on the CPU, and to write its row; on a GPU the run's
    are the GPU's, of full batches.
    """
    predictor = create_predictor(OnnxModel(artifact, provider, threads=1))
    batch = BATCH if provider in ON_GPU else 1
    said = predictor.metadata
    files = [File(path.name, str(path).encode()) for path in paths]
    prepared, decode_ms = timed(lambda: [prepare(path, said) for path in paths])
    _, run_ms = timed(lambda: [predictor.predict(prepared[i : i + batch]) for i in range(0, len(paths), batch)])
    with ThreadPoolExecutor(1) as pool:
        rows = [row for (some,) in predict_files([predictor], files, BATCH, pool, 1) for row in some]
    output = Output(folder, ["m"], len(rows))
    _, write_ms = timed(lambda: output.write(0, [to_table(rows, said)]))
    pixels = [getattr(item, "pixels", item).nbytes for item in prepared]
    return {
        "decode": decode_ms / len(paths), "run": run_ms / len(paths), "write": write_ms / len(paths),
        "decoded_kib": statistics.mean(pixels) / 1024,
    }  # fmt: skip


def timed(work: Any, rounds: int = 3) -> tuple[Any, float]:
    """What the work gives, and the median of its milliseconds."""
    times = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        result = work()
        times.append((time.perf_counter() - start) * 1000)
    return result, statistics.median(times[1:])


def markdown(result: dict[str, Any]) -> str:
    """A row a job and a DataLoader: their speed, how much of the best loop's, with the spread, and of the best
    DataLoader's that is, and seconds to start.
    """
    rows = []
    for name, figures in result["models"].items():
        for key, ratio in figures["over_the_loop"].items():
            ratios = with_spread(ratio, *figures["spread"][key]), f"{figures['over_the_loader'][key]:.2f}"
            rows.append([name, key, f"{figures['images_per_s'][key]:.1f}", *ratios, f"{figures['start_s'][key]:.1f}"])
        best = figures["best_loop"]
        rows.append([name, best, f"{figures['images_per_s'][best]:.1f}", "1", "–", "–"])
    return "\n".join(table(["model", "", "images/s", "/ best loop", "/ best DataLoader", "start, s"], rows))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
