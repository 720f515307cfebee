"""Many images through one artefact on Ray Data, into one Parquet file; no torch here.

One row an image, in the order of the input.
"""

import contextlib
import gc
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from backbones.errors import InputError
from backbones.files import IMAGE_SUFFIXES, list_images, write_aside
from backbones.preprocess import ImageError
from backbones.progress import progress
from serving.artifact import Artifact
from serving.predictor import Predictor, create_predictor
from serving.providers import ON_GPU, Provider
from serving.ray_start import start_ray
from serving.results import Row, schema_of, to_table
from serving.runtime import OnnxModel, usable_cores

BATCHES_A_TASK = 8  # at most: enough to hide Ray's cost of a task, few enough for the progress bar to move
ROWS_A_GROUP = 4096  # of the Parquet file, and held in memory until then


@dataclass(frozen=True)
class File:
    """An image to read: its name in the results and where it is."""

    name: str
    source: bytes  # an absolute path as the operating system has it, which need not be UTF-8


def run_batch(
    model: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    batch_size: int = 8,
    actors: int = 1,
    num_gpus: float = 0,
    provider: Provider = "auto",
) -> dict[str, Any]:
    """Predict every image of `input` (a folder, an image, or a `.txt` of paths) and write `output`.

    A file that cannot be decoded becomes a row with its error. `num_gpus` is of each actor; `auto` is CUDA if
    it is over 0. Ray is started if need be and then shut down; a Ray that runs already is left running.

    Raises:
        InputError: no images, no artefact, an output that cannot be written, or GPUs that cannot be had.
    """
    start = time.perf_counter()
    if min(batch_size, actors) < 1 or num_gpus < 0:
        raise InputError(f"batch_size={batch_size}, actors={actors}, num_gpus={num_gpus}: give at least 1, 1 and 0")
    if provider == "auto":
        provider = "cuda" if num_gpus else "cpu"
    if (provider in ON_GPU) != (num_gpus > 0):
        raise InputError(
            f"provider {provider} does not go with num_gpus={num_gpus}: cuda and tensorrt need a share of a GPU, and "
            "no other has a use for it"
        )
    files = list_files(Path(input))
    here: Provider = "cpu" if provider in ON_GPU else provider  # the GPU is the actors'
    artifact = create_predictor(OnnxModel(model, here, threads=1)).metadata
    if Path(output).is_dir():
        raise InputError(f"output {output} is a folder: name a file in it, such as {Path(output) / 'results.parquet'}")
    tasks = list(_parts(files, batch_size * _batches_a_task(len(files), batch_size, actors)))
    with write_aside(output) as aside, progress(total=len(files), desc="batch", unit="image") as bar, _ray():
        worker = {
            "path": str(Path(model).absolute()),
            "provider": provider,
            "batch_size": batch_size,
        }
        results = _stream(tasks, worker, actors, num_gpus)
        with contextlib.closing(results):
            errors = _write(results, aside, artifact, bar)
        assert bar.n == len(files), f"{len(files)} images went in and {bar.n} came out"
    seconds = time.perf_counter() - start
    return {
        "images": len(files),
        "errors": errors,
        "seconds": seconds,
        "images_per_s": len(files) / seconds,
        "output": str(output),
    }


def list_files(source: Path) -> list[File]:
    """The images of a folder tree (sorted), of a text file with one path a line, or the one image.

    Raises:
        InputError: nothing there, or neither of these.
    """
    if source.is_dir():
        files = [_file(path.relative_to(source).as_posix(), path) for path in list_images(source)]
        problem = f"no images ({', '.join(IMAGE_SUFFIXES)}) below {source}: is it the right folder?"
    elif not source.is_file():
        raise InputError(f"no input at {source}: give a folder of images, an image, or a .txt file of paths")
    elif source.suffix.lower() == ".txt":
        try:
            lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {source} ({error}): give a text file in UTF-8, one path a line") from None
        files = [_file(line, source.parent / line) for line in lines if line]
        problem = f"{source} lists no images: write one path a line, relative to its folder"
    elif source.suffix.lower() in IMAGE_SUFFIXES:
        files = [_file(str(source), source)]
    else:
        raise InputError(f"{source} is no image ({', '.join(IMAGE_SUFFIXES)}) and no .txt file of paths: give either")
    if not files:
        raise InputError(problem)
    return files


def _file(name: str, path: Path) -> File:
    return File(_text(name), os.fsencode(path.absolute()))


def _text(name: str) -> str:
    """A file name without the surrogates that stand for bytes that are no UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _batches_a_task(images: int, batch_size: int, actors: int) -> int:
    """Several tasks for each actor, so that none waits long for the last one."""
    return max(1, min(BATCHES_A_TASK, images // (batch_size * actors * 4)))


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def predict_files(
    predictor: Predictor, files: Sequence[File], batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[Row]]:
    """Rows in the order of `files`, a batch at a time; while one batch runs, `pool` decodes the next."""
    ahead: deque[tuple[Sequence[File], list[Future[Any]]]] = deque()
    for part in _parts(files, batch_size):
        ahead.append((part, [pool.submit(predictor.prepare, os.fsdecode(file.source)) for file in part]))
        if len(ahead) == 2:
            yield _predict(predictor, *ahead.popleft())
    while ahead:
        yield _predict(predictor, *ahead.popleft())


def _predict(predictor: Predictor, files: Sequence[File], prepared: Sequence[Future[Any]]) -> list[Row]:
    errors: dict[int, str] = {}
    good = {}
    for i, future in enumerate(prepared):
        try:
            good[i] = future.result()
        except ImageError as error:
            errors[i] = _text(str(error))
    predicted: Sequence[Any] = predictor.predict(list(good.values())) if good else []
    results = dict(zip(good, predicted, strict=True))
    return [Row(file.name, results.get(i), errors.get(i)) for i, file in enumerate(files)]


class BatchWorker:
    """A predictor in a Ray actor: a row with one task's files in, tables of `schema_of` out."""

    def __init__(self, path: str, provider: Provider, batch_size: int, threads: int):
        cores = usable_cores()
        threads = min(threads, cores)
        self.predictor = create_predictor(OnnxModel(path, provider, threads))
        self.batch_size = batch_size
        self.pool = ThreadPoolExecutor(cores if provider in ON_GPU else threads, thread_name_prefix="decode")

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        (task,) = table.to_pylist()
        files = [File(*pair) for pair in zip(task["names"], task["sources"], strict=True)]
        for rows in predict_files(self.predictor, files, self.batch_size, self.pool):
            yield to_table(rows, self.predictor.metadata)


def _write(tables: Iterable[pa.Table], path: Path, artifact: Artifact, bar: "tqdm[Any]") -> int:
    """Write the tables as they come; how many rows hold an error."""
    errors = 0
    waiting: list[pa.Table] = []
    schema = schema_of(artifact)
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            waiting.append(table.select(schema.names).cast(schema))
            if sum(map(len, waiting)) >= ROWS_A_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
            errors += table["error"].length() - table["error"].null_count
            bar.set_postfix(errors=errors, refresh=False)
            bar.update(len(table))
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    return errors


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """Ray, started here unless it runs already, and shut down only if started here."""
    started = start_ray()
    import ray

    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _stream(
    tasks: Sequence[Sequence[File]], worker: dict[str, Any], actors: int, num_gpus: float
) -> Generator[pa.Table, None, None]:
    """The files of each task through a pool of actors, in order; Ray Data's backpressure bounds what waits."""
    import ray.data
    from ray.exceptions import RayTaskError

    total = ray.cluster_resources()
    free = ray.available_resources()
    if num_gpus * actors > free.get("GPU", 0):
        raise InputError(
            f"{actors} actors with num_gpus={num_gpus} each, but Ray has {free.get('GPU', 0):g} GPUs free of "
            f"{total.get('GPU', 0):g}: ask for less"
        )
    # One row a task: Ray Data splits rows evenly, and a batch should not depend on how. Nor `from_arrow`, whose
    # own tasks ask for a CPU and wait for ever if there is none.
    items = [{"names": [file.name for file in task], "sources": [file.source for file in task]} for task in tasks]
    files = ray.data.from_items(items, override_num_blocks=len(items))
    files.context.enable_progress_bars = False
    files.context.print_on_execution_start = False
    files.context.execution_options.preserve_order = True
    results = files.map_batches(
        BatchWorker,
        fn_constructor_kwargs=worker | {"threads": max(1, int(total.get("CPU", 1)) // actors)},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        # What others, such as Serve's replicas, leave over: asking for more would wait for ever.
        num_cpus=min(100, int(100 * free.get("CPU", 0) / actors)) / 100,
        num_gpus=num_gpus,
    )
    mistake = ""
    try:
        yield from results.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        if not isinstance(error.cause, InputError):
            raise
        mistake = str(error.cause).splitlines()[0]  # Ray Data adds lines of its own
    if mistake:
        gc.collect()  # the actors of a failed job stop when nothing refers to them, which tracebacks do
        raise InputError(mistake)
