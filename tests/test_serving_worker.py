"""What a process of a batch job does with a chunk of images, without Ray."""

import io
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from artifacts import picture, write_classifier
from PIL import Image

from backbones.errors import InputError
from backbones.preprocess import ImageError
from serving.artifact import read_whole
from serving.jobs import worker
from serving.jobs.inputs import File
from serving.jobs.results import PICTURE
from serving.jobs.worker import BatchWorker, WorkerModel, local_file, predict_files, result_of
from serving.predictor import create_predictor
from serving.runtime import OnnxModel


@pytest.fixture
def files(tmp_path: Path) -> list[File]:
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(picture("red"))
    return [local_file(tmp_path / f"{i}.png") for i in range(10)]


def model_of(path: Path) -> WorkerModel:
    return WorkerModel(str(path), "cpu", read_whole(path).sha256)


class Counting(ThreadPoolExecutor):
    submitted = 0

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        return super().submit(*args, **kwargs)


@pytest.mark.parametrize(("batch_size", "decoders", "ahead"), [(1, 1, 2), (1, 4, 5), (2, 2, 4), (2, 5, 8), (8, 2, 10)])
def test_as_many_images_are_decoded_ahead_as_there_are_decoders(files, tmp_path, batch_size, decoders, ahead) -> None:
    """In whole batches, beside the one that runs."""
    predictor = create_predictor(OnnxModel(write_classifier(tmp_path / "m.onnx"), "cpu", cache=False))
    with Counting(decoders) as pool:
        batches = predict_files([predictor], files, batch_size, pool, decoders)
        (first,) = next(batches)
        assert (len(first), pool.submitted) == (batch_size, ahead)
        rows = [*first, *(row for (some,) in batches for row in some)]
    assert [row.path for row in rows] == [file.name for file in files]
    assert all(row.error is None for row in rows)


def test_a_gpus_first_run_is_before_the_images_begin(files, tmp_path, monkeypatch) -> None:
    """The CPU stands for it."""
    monkeypatch.setattr(worker, "ON_GPU", ("cpu",))
    one = BatchWorker([model_of(write_classifier(tmp_path / "m.onnx"))], 2, 1, False)
    runs: list[float] = []
    predict = one.predictors[0].predict

    def timed(prepared: Sequence[Any]) -> Any:
        runs.append(time.time())
        return predict(prepared)

    monkeypatch.setattr(one.predictors[0], "predict", timed)
    first, second = (result_of(*one(worker._row_of((files, None)))) for _ in range(2))
    assert [table.num_rows for table in (*first.tables, *second.tables)] == [10, 10]
    assert len(runs) == 2 + 10 + 10
    assert runs[1] <= first.began <= runs[2]


def test_rows_are_of_the_artefact_that_the_job_began_with(files, tmp_path) -> None:
    model = model_of(write_classifier(tmp_path / "m.onnx"))
    write_classifier(tmp_path / "m.onnx", name="another")
    late = BatchWorker([model], 2, 1, False)  # as an actor that starts again is
    with pytest.raises(InputError, match="m.onnx was replaced since the job began"):
        next(late(worker._row_of((files, None))))


def test_what_cannot_be_drawn_ends_no_job(tmp_path, monkeypatch) -> None:
    """A picture too long for JPEG, and one that is gone when it is read for the second time."""
    monkeypatch.setattr(worker, "LONGEST_JPEG", 50)
    files = [local_file(tmp_path / name) for name in ("long.png", "gone.png")]
    for file in files:
        Path(file.name).write_bytes(picture("red", (80, 40)))
    one = BatchWorker([model_of(write_classifier(tmp_path / "m.onnx"))], 2, 1, True)
    read, seen = File.read, set()

    def once(file: File) -> Any:
        if file.name.endswith("gone.png") and file in seen:
            raise ImageError("the store has no such object")
        seen.add(file)
        return read(file)

    monkeypatch.setattr(File, "read", once)
    (table,) = result_of(*one(worker._row_of((files, None)))).tables
    assert table["error"].to_pylist() == [None, None]
    drawn, none = table[PICTURE].to_pylist()
    assert Image.open(io.BytesIO(drawn)).size == (50, 25) and none is None
