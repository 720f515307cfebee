"""Many images through one or several artefacts on Ray Data, into a folder of Parquet parts; no torch here.

    list ──► [decode] ──► predict ──► parts
    a task   tasks, or    a pool of   here, in the input's order
    here     in actors    actors

Chunks of images go through in order, so that what is finished is always a beginning of the input: `jobs/parts.py`
says how a job goes on. Ray Data bounds what waits between the stages; the list is read as it is needed.

Ray Data's own checkpoints (2.60) would not do: they want an id that is unique among the rows, where a list may name an
image twice; hold all finished ids in memory; and do not say which artefact and which input the rows are of.
"""

import contextlib
import gc
import itertools
import math
import os
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from backbones.errors import InputError
from backbones.progress import progress
from serving.artifact import Artifact
from serving.jobs.config import BatchConfig
from serving.jobs.exports import check_export, write_export
from serving.jobs.inputs import list_files
from serving.jobs.parts import INPUTS, LISTED, Output, room_on_disk, write_list
from serving.jobs.report import check_labels, check_truth, write_report
from serving.jobs.worker import BatchWorker, Chunk, Decoder, Lister, WorkerModel, result_of
from serving.predictor import create_predictor
from serving.ray_start import start_ray
from serving.runtime import OnnxModel
from serving.sessions.providers import ON_GPU

BATCHES_A_CHUNK = 8  # at most: enough to hide Ray's cost of a task, few enough for the progress bar to move
VAIN_STARTS = 2  # of the workers in a row, without a finished part, before the job ends
DECODED_BATCHES_A_CHUNK = 2  # of decode=tasks, whose chunks carry pixels
ENOUGH = 100  # images, before a share of errors means anything
RETRIES = 3  # of a chunk whose worker died: an image may be what killed it
# What Ray Data's listing may be ahead of the actors; read when ray.data is imported.
_BACKPRESSURE = "RAY_DATA_DOWNSTREAM_CAPACITY_OBJECT_STORE_BUDGET_UTIL_THRESHOLD"


@dataclass(frozen=True)
class Opened:
    """A model of the config, and what its artefact says."""

    name: str
    artifact: Artifact
    worker: WorkerModel


def run_batch(config: BatchConfig) -> dict[str, Any]:
    """Predict every image of the input, or those that an earlier start did not, and report on all; the summary.

    Ray is started if need be and then shut down; a Ray that runs already is left running.

    Raises:
        InputError: no images, no artefact, an output of another job or that cannot be written, GPUs that cannot be had,
            or too many images that cannot be read.
    """
    start = time.perf_counter()
    opened = [_open(config, i) for i in range(len(config.models))]
    files = list_files(config.input, config.images, config.labels == "folder")
    files = itertools.chain([next(files)], files)  # it is there: now the folder may be
    folder = Path(config.output)
    output = Output(folder, [model.name for model in config.models], config.part_rows)
    with output.locked():
        with room_on_disk(folder):
            listing = write_list(files, folder / LISTED)
        artifacts = [model.artifact for model in opened]
        for model, artifact in zip(config.models, artifacts, strict=True):
            if model.results is not None:
                check_export(model.results, artifact, listing.has_ids)
        targets = check_labels(listing, artifacts, config.input)
        check_truth(config.input, artifacts)
        job: dict[str, Any] = {f"artefact {model.name}": model.worker.sha256 for model in opened}
        job |= {"number of images": listing.images, "input": listing.sha256}
        with room_on_disk(folder):
            output.claim(job | {"part_rows": config.part_rows, "annotated": config.annotated})
        ready = _predict(config, opened, output, listing.images)
        with room_on_disk(folder):
            for model, artifact in zip(config.models, artifacts, strict=True):
                if model.results is not None:
                    write_export(folder / model.name, model.results, artifact)
            return write_report(config, output, artifacts, targets, ready | {"total_s": time.perf_counter() - start})


def _open(config: BatchConfig, index: int) -> Opened:
    """Find out here, before Ray starts, what is wrong with an artefact."""
    model = config.models[index]
    provider = config.provider(model)
    here = "cpu" if provider in ON_GPU else provider  # the GPU is the actors'
    opened = OnnxModel(model.artifact, here, threads=1)
    worker = WorkerModel(str(Path(model.artifact).absolute()), provider, opened.sha256)
    return Opened(model.name, create_predictor(opened).metadata, worker)


def _predict(config: BatchConfig, models: Sequence[Opened], output: Output, images: int) -> dict[str, Any]:
    """Make the parts that are missing. How that went: images, seconds until a worker began the first, which is the
    start of Ray and of the actors, and images a second from there to the end of the last.
    """
    _, tally = _so_far(config, output, images)
    ready: dict[str, Any] = {"predicted": images - tally.seen, "start_s": None, "images_per_s": None}
    if tally.seen < images:
        started = time.time()
        with progress(total=images, initial=tally.seen, desc="batch", unit="image") as bar, _ray():
            tally, last = _until_done(config, models, output, images, bar)
        ready |= {"start_s": last.began - started, "images_per_s": last.images / (last.ended - last.began)}
    return ready | {"errors": tally.errors}


def _until_done(
    config: BatchConfig, models: Sequence[Opened], output: Output, images: int, bar: "tqdm[Any]"
) -> tuple["Tally", "Stretch"]:
    """Start workers until the parts are all there; what the last ones did."""
    vain = 0
    while True:
        done, tally = _so_far(config, output, images)
        bar.n = first = tally.seen
        bar.set_postfix(errors=tally.errors, refresh=False)
        try:
            with contextlib.closing(_stream(config, models, output.folder.absolute() / INPUTS, first, images)) as found:
                began, ended = _write(found, output, done, tally, bar)
            assert tally.seen == images, f"{images} images went in and {tally.seen} came out"
            return tally, Stretch(images - first, began, ended)
        except WorkersEnded:
            vain = 0 if output.parts_done() > done else vain + 1
            if vain == VAIN_STARTS:
                raise
            time.sleep(1)  # Ray may still be finding out who has gone


class Stretch(NamedTuple):
    """Images that went through one after the other, and when the first was begun and the last ended, in s."""

    images: int
    began: float
    ended: float


class WorkersEnded(InputError):
    """Ray gave up on the job's workers; what is finished is kept."""


def _so_far(config: BatchConfig, output: Output, images: int) -> tuple[int, "Tally"]:
    """The parts that are there, and the images and errors in them."""
    done = output.parts_done()
    errors = sum(map(output.errors_in, range(done)))
    return done, Tally(config, min(images, done * config.part_rows), errors)


@dataclass
class Tally:
    """Images seen and those with an error, over all starts of the job."""

    config: BatchConfig
    seen: int
    errors: int

    def add(self, tables: Sequence[pa.Table]) -> None:
        """Count a chunk.

        Raises:
            InputError: an error that the config does not suffer, or too many.
        """
        first = ""
        for i, errors in enumerate(zip(*(table["error"].to_pylist() for table in tables), strict=True)):
            self.seen += 1
            if error := next(filter(None, errors), None):
                self.errors += 1
                first = first or f"{tables[0]['path'][i].as_py()}: {error}"
        if first and self.config.on_error == "fail":
            raise InputError(f"{first} (on_error=row would note it and go on)")
        limit = self.config.max_error_share
        if self.seen >= ENOUGH and self.errors > limit * self.seen:
            example = f", such as {first}" if first else ""
            raise InputError(
                f"{self.errors} of {self.seen} images failed, over max_error_share={limit:g}{example}: mend the input, "
                "or raise the limit and start again"
            )


def _write(results: Iterator[Chunk], output: Output, part: int, tally: Tally, bar: "tqdm[Any]") -> tuple[float, float]:
    """Write parts as the chunks come, from number `part` on; when the first was begun and the last ended."""
    waiting: list[list[pa.Table]] = []
    rows, first, last = 0, math.inf, 0.0

    def flush(count: int) -> None:
        nonlocal waiting, rows, part
        whole = [pa.concat_tables(tables) for tables in zip(*waiting, strict=True)]
        output.write(part, [table.slice(0, count) for table in whole])
        waiting, rows, part = [[table.slice(count) for table in whole]], rows - count, part + 1

    for tables, began, ended in results:
        first, last = min(first, began), max(last, ended)
        tally.add(tables)
        waiting.append(tables)
        rows += len(tables[0])
        bar.set_postfix(errors=tally.errors, refresh=False)
        bar.update(len(tables[0]))
        while rows >= output.rows:
            flush(output.rows)
    if rows:
        flush(rows)
    return first, last


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """Ray, started here unless it runs already, and shut down only if started here."""
    os.environ.setdefault(_BACKPRESSURE, "0")
    started = start_ray()
    import ray

    try:
        yield
    finally:
        if started:
            ray.shutdown()


def chunk_size(config: BatchConfig, images: int) -> int:
    """Images of a chunk: several chunks for each actor, so that none waits long for the last one."""
    most = BATCHES_A_CHUNK if config.decode == "actors" else DECODED_BATCHES_A_CHUNK
    return config.batch_size * max(1, min(most, images // (config.batch_size * config.actors.most * 4)))


def _stream(
    config: BatchConfig, models: Sequence[Opened], inputs: Path, first: int, images: int
) -> Generator[Chunk, None, None]:
    """The chunks from image `first` on, in order."""
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.annotations import RayDeprecationWarning

    actors, total, free = config.actors, ray.cluster_resources(), ray.available_resources()
    if actors.num_gpus * actors.min_actors > free.get("GPU", 0):
        raise InputError(
            f"{actors.min_actors} actors with num_gpus={actors.num_gpus:g} each, but Ray has {free.get('GPU', 0):g} "
            f"GPUs free of {total.get('GPU', 0):g}: ask for less"
        )
    with warnings.catch_warnings():
        # 2.64 will take no retries or strategies any more; today's own default is to retry for ever.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = _pipeline(config, models, inputs, first, images)
    mistake: InputError | None = None
    try:
        for row in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield result_of(row)
    except RayTaskError as error:
        if not isinstance(error.cause, InputError):
            raise
        mistake = InputError(str(error.cause).splitlines()[0])  # Ray Data adds lines of its own
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        mistake = WorkersEnded(f"the job's workers end, last with: {reason}; what is finished is kept")
    if mistake is not None:
        gc.collect()  # the actors of a failed job stop when nothing refers to them, which tracebacks do
        raise mistake


def _pipeline(config: BatchConfig, models: Sequence[Opened], inputs: Path, first: int, images: int) -> Any:
    import ray.data
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actors, cpus = config.actors, ray.cluster_resources().get("CPU", 1)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    rows: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    data: ray.data.Dataset = ray.data.from_items([{"data": b""}])
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    data.context.execution_options.preserve_order = True
    data.context.target_max_block_size = 1  # a row is a block, and so a task: a batch depends on nothing else
    # No CPU: others, such as Serve's replicas, may hold all of them, and it would wait for ever.
    lister = Lister(inputs, first, chunk_size(config, images))
    data = data.map_batches(lister.__call__, **rows, num_cpus=0, scheduling_strategy=here)
    if config.decode == "tasks":
        decoder = Decoder([model.artifact for model in models])
        data = data.map_batches(decoder.__call__, **rows, num_cpus=1, scheduling_strategy="SPREAD")
        # Actors that start again after a node's end could hold the last CPU, and nothing be decoded; not those of GPUs.
        share = float(actors.num_gpus > 0)
    else:
        share = _share(ray.available_resources().get("CPU", 0), actors.most)
    worker = {
        "models": [model.worker for model in models],
        "batch_size": config.batch_size,
        "threads": actors.threads or max(1, int(cpus) // actors.most),
        "annotated": config.annotated,
    }
    return data.map_batches(
        BatchWorker,
        fn_constructor_kwargs=worker,
        compute=ray.data.ActorPoolStrategy(min_size=actors.min_actors, max_size=actors.most),
        num_cpus=share if actors.num_cpus is None else actors.num_cpus,
        num_gpus=actors.num_gpus,
        scheduling_strategy="SPREAD",
        max_task_retries=RETRIES,
        **rows,
    )


def _share(cpus: float, actors: int) -> float:
    """An actor's part of the CPUs that are free, in hundredths."""
    return max(0, min(100, int(100 * cpus / actors))) / 100
