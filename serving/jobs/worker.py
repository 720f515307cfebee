"""What the processes of a batch job do: decode images once for all models, run these, make tables; no torch here.

Ray Data hands on rows, here of one column: a chunk of images, pickled, then what became of it.
"""

import io
import math
import os
import pickle
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from backbones.errors import InputError
from backbones.preprocess import ImageError, decode
from detection.drawing import LONGEST_JPEG
from serving.artifact import Artifact
from serving.jobs.inputs import File, text_of
from serving.jobs.parts import read_list
from serving.jobs.results import PICTURE, Row, to_table
from serving.predictor import Predictor, create_predictor, prepare
from serving.runtime import OnnxModel, usable_cores
from serving.sessions.providers import ON_GPU, Provider


@dataclass(frozen=True)
class Prepared:
    """An image as the models take it, an error in place of what cannot be; and how long that took."""

    items: list[Any]
    decode_ms: float


def prepare_file(file: File, artifacts: Sequence[Artifact]) -> Prepared:
    """Read and decode an image once, and resize it for each model."""
    start = time.perf_counter()
    items: list[Any] = []
    try:
        source = file.read()
        image = source if len(artifacts) == 1 else np.asarray(decode(source))
    except ImageError as error:
        items = [error] * len(artifacts)
    for artifact in artifacts[len(items) :]:
        try:
            items.append(prepare(image, artifact))
        except ImageError as error:
            items.append(error)
    return Prepared(items, (time.perf_counter() - start) * 1000)


def predict_files(
    predictors: Sequence[Predictor], files: Sequence[File], batch_size: int, pool: ThreadPoolExecutor, decoders: int
) -> Iterator[list[list[Row]]]:
    """Of a batch at a time the rows of each predictor, in the order of `files`; while one batch runs, `pool`, which has
    `decoders` threads, decodes the next, or as many as keep it busy.
    """
    artifacts = [predictor.metadata for predictor in predictors]
    most = 1 + math.ceil(decoders / batch_size)
    ahead: deque[tuple[Sequence[File], list[Future[Prepared]]]] = deque()
    for i in range(0, len(files), batch_size):
        part = files[i : i + batch_size]
        ahead.append((part, [pool.submit(prepare_file, file, artifacts) for file in part]))
        if len(ahead) == most:
            part, futures = ahead.popleft()
            yield predict_prepared(predictors, part, [future.result() for future in futures])
    for part, futures in ahead:
        yield predict_prepared(predictors, part, [future.result() for future in futures])


def predict_side_by_side(
    predictors: Sequence[Predictor],
    files: Sequence[File],
    prepared: Sequence[Prepared | None],
    pool: ThreadPoolExecutor,
) -> Iterator[list[list[Row]]]:
    """Of an image at a time the rows of each predictor, in the order of `files`: a thread of `pool` does all of an
    image, and of predictors with one thread each all cores are busy at all times.
    """
    artifacts = [predictor.metadata for predictor in predictors]

    def whole(file: File, image: Prepared | None) -> list[list[Row]]:
        return predict_prepared(predictors, [file], [image or prepare_file(file, artifacts)])

    return pool.map(whole, files, prepared)


def predict_prepared(
    predictors: Sequence[Predictor], files: Sequence[File], prepared: Sequence[Prepared]
) -> list[list[Row]]:
    """The rows of each predictor for one batch."""
    return [
        _rows(predictor, files, prepared, [image.items[i] for image in prepared])
        for i, predictor in enumerate(predictors)
    ]


def _rows(predictor: Predictor, files: Sequence[File], prepared: Sequence[Prepared], items: list[Any]) -> list[Row]:
    good = [item for item in items if not isinstance(item, ImageError)]
    start = time.perf_counter()
    results: Iterator[Any] = iter(predictor.predict(good) if good else [])
    run_ms = (time.perf_counter() - start) * 1000 / max(1, len(good))
    return [
        Row(file.name, None, text_of(str(item)), file.image_id, image.decode_ms)
        if isinstance(item, ImageError)
        else Row(file.name, next(results), None, file.image_id, image.decode_ms, run_ms)
        for file, image, item in zip(files, prepared, items, strict=True)
    ]


def _row_of(value: Any) -> pa.Table:
    """One row for Ray Data, which need not know what is in it."""
    return pa.table({"data": pa.array([pickle.dumps(value, protocol=5)], pa.large_binary())})


def _value_of(table: pa.Table) -> Any:
    (data,) = table["data"]
    return pickle.loads(data.as_buffer())


class Lister:
    """Chunks of a written list, as they are asked for; a task on the machine that has it."""

    def __init__(self, path: Path, start: int, chunk: int):
        self.path, self.start, self.chunk = path, start, chunk

    def __call__(self, _: pa.Table) -> Iterator[pa.Table]:
        files: list[File] = []
        for file in read_list(self.path, self.start):
            files.append(file)
            if len(files) == self.chunk:
                yield _row_of((files, None))
                files = []
        if files:
            yield _row_of((files, None))


class Decoder:
    """Decoding on its own, as tasks on any CPU."""

    def __init__(self, artifacts: Sequence[Artifact]):
        self.artifacts = artifacts

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        files, _ = _value_of(table)
        yield _row_of((files, [prepare_file(file, self.artifacts) for file in files]))


@dataclass(frozen=True)
class WorkerModel:
    """What a worker has to know of a model."""

    path: str
    provider: Provider
    sha256: str


class Chunk(NamedTuple):
    """A table a model, and when the worker began and ended them, in seconds since the epoch."""

    tables: list[pa.Table]
    began: float
    ended: float


class BatchWorker:
    """The models in a Ray actor: a chunk of images in, a list with the table of each model out.

    On the CPU in onnxruntime, images are run side by side, a thread each, which is faster than batches; `batch_size` is
    of the others.
    """

    def __init__(self, models: Sequence[WorkerModel], batch_size: int, threads: int, annotated: bool):
        threads = min(threads, usable_cores())
        self.side_by_side = all(model.provider == "cpu" for model in models)
        opened = [OnnxModel(model.path, model.provider, 1 if self.side_by_side else threads) for model in models]
        self.predictors = [create_predictor(model) for model in opened]
        self.changed = [model.path for model, found in zip(models, opened, strict=True) if found.sha256 != model.sha256]
        self.models = models
        self.batch_size, self.annotated = batch_size, annotated
        self.threads, self.pool = threads, ThreadPoolExecutor(threads, thread_name_prefix="images")
        self.cold = any(model.provider in ON_GPU for model in models)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:  # of a generator Ray Data hands on errors as they are
        for path in self.changed:  # rows of two models, of which one would pass for the other
            raise InputError(f"{path} was replaced since the job began: put that file back, or name another output")
        files, prepared = _value_of(table)
        if self.cold:  # a GPU's first run takes a second
            self.cold = False
            list(self._predict(files[: self.batch_size], prepared and prepared[: self.batch_size]))
        began = time.time()
        rows: list[list[Row]] = [[] for _ in self.predictors]
        for batch in self._predict(files, prepared):
            for all_rows, some in zip(rows, batch, strict=True):
                all_rows += some
        tables = [self._table(i, files, rows[i]) for i in range(len(rows))]
        yield _row_of(Chunk(tables, began, time.time()))

    def _predict(self, files: Sequence[File], prepared: Sequence[Prepared] | None) -> Iterator[list[list[Row]]]:
        if self.side_by_side:
            yield from predict_side_by_side(self.predictors, files, prepared or [None] * len(files), self.pool)
        elif prepared is None:
            yield from predict_files(self.predictors, files, self.batch_size, self.pool, self.threads)
        else:
            for i in range(0, len(files), self.batch_size):
                part = slice(i, i + self.batch_size)
                yield predict_prepared(self.predictors, files[part], prepared[part])

    def _table(self, i: int, files: Sequence[File], rows: Sequence[Row]) -> pa.Table:
        artifact = self.predictors[i].metadata
        table = to_table(rows, artifact, self.models[i].sha256)
        if not self.annotated:
            return table
        drawn = self.pool.map(_drawn, files, rows, [artifact] * len(rows))
        return table.append_column(PICTURE, pa.array(list(drawn), pa.binary()))


def _drawn(file: File, row: Row, artifact: Artifact) -> bytes | None:
    """An image with its result drawn on it, as JPEG; smaller if that holds none so long, and none if it is gone."""
    from serving.report import picture_of  # with matplotlib, which other jobs start without

    if row.result is None:
        return None
    try:
        picture = picture_of(decode(file.read()), row.result, artifact.classes)
    except ImageError:  # read once more, and not there any more
        return None
    picture.thumbnail((LONGEST_JPEG, LONGEST_JPEG))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def result_of(row: Any) -> Chunk:
    """What the worker made of a chunk."""
    found = _value_of(row)
    assert isinstance(found, Chunk)
    return found


def local_file(path: Path, name: str | None = None) -> File:
    """An image in a local file."""
    return File(text_of(name or str(path)), os.fsencode(path.absolute()))
