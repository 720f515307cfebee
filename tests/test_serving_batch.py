"""The batch job: rows are the predictor's own, broken files are rows, and mistakes are told before Ray starts."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import write_classifier, write_detector
from onnx import numpy_helper
from PIL import Image

from backbones.errors import InputError
from serving import batch
from serving.artifact import read_whole, write_artifact
from serving.batch import list_files, run_batch
from serving.predictor import Classification, Detections, create_predictor
from serving.ray_start import start_ray
from serving.results import Row, read_results, to_table
from serving.runtime import OnnxModel

# Ray Data sets its own deprecated settings.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")


@pytest.fixture(scope="module")
def ray_running() -> Iterator[None]:
    assert start_ray(num_cpus=2)
    import ray

    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 noisy images of several sizes in nested folders, one of them rotated by its EXIF tag."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(13):
        shape = (int(rng.integers(30, 200)), int(rng.integers(30, 200)), 3)
        picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1
        path = root / ("a", "b/c", ".")[i % 3] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, exif=exif)
    return root


@pytest.fixture(scope="module")
def broken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of three good images and five that cannot be read."""
    root = tmp_path_factory.mktemp("broken")
    whole = (images / "00.jpg" if (images / "00.jpg").exists() else images / "a" / "00.jpg").read_bytes()
    good = root / "in" / "good.jpg"
    good.parent.mkdir()
    good.write_bytes(whole)
    (root / "in" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "in" / "empty.png").touch()
    (root / "in" / "text.jpg").write_text("no image")
    raw = root / "in" / os.fsdecode(b"latin-\xe9.jpg")  # a name that is no UTF-8
    raw.write_bytes(b"broken too")
    manifest = root / "list.txt"
    lines = ["in/good.jpg", "in/truncated.jpg", "", "in/empty.png", f"{good}", "in/text.jpg", "in/none.jpg"]
    manifest.write_text("\n".join([*lines, "  in/good.jpg  "]) + "\n")
    return manifest


def bits(result: Classification | Detections | None) -> list[bytes | tuple[int, int]]:
    if isinstance(result, Classification):
        return [result.indices.tobytes(), result.probabilities.tobytes()]
    assert isinstance(result, Detections)
    return [result.boxes.tobytes(), result.scores.tobytes(), result.indices.tobytes(), result.size]


def wait_for_cpus() -> None:
    import ray

    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, "an actor of an ended job still runs"
        time.sleep(0.1)


@pytest.mark.usefixtures("ray_running")
@pytest.mark.parametrize(
    ("write_model", "batch_size", "actors"),
    [(write_classifier, 1, 1), (write_classifier, 4, 1), (write_classifier, 4, 2), (write_detector, 4, 2)],
)
def test_rows_are_the_predictors_own(
    write_model: Callable[[Path], Path], images: Path, tmp_path: Path, batch_size: int, actors: int
) -> None:
    model = write_model(tmp_path / "model.onnx")
    output = tmp_path / "made" / "results.parquet"
    summary = run_batch(model, images, output, batch_size=batch_size, actors=actors)
    predictor: Any = create_predictor(OnnxModel(model, "cpu"))
    artifact, rows = read_results(output)
    assert artifact == predictor.metadata
    assert (summary["images"], summary["errors"], summary["output"]) == (13, 0, str(output))
    assert summary["images_per_s"] == pytest.approx(13 / summary["seconds"])
    paths = [path.relative_to(images).as_posix() for path in sorted(images.rglob("*.jpg"))]
    assert [row.path for row in rows] == paths
    for row in rows:
        expected = predictor.predict([predictor.prepare(images / row.path)])[0]
        assert bits(row.result) == bits(expected), row.path
    table = pq.read_table(output)
    assert table["labels"].to_pylist() == [[artifact.classes[i] for i in row] for row in table["indices"].to_pylist()]
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.usefixtures("ray_running")
def test_broken_files_are_rows_in_their_place(broken: Path, tmp_path: Path) -> None:
    summary = run_batch(write_classifier(tmp_path / "m.onnx"), broken, tmp_path / "r.parquet", batch_size=4)
    _, rows = read_results(tmp_path / "r.parquet")
    good = [row.path for row in rows if row.status == "ok"]
    assert good == ["in/good.jpg", f"{broken.parent}/in/good.jpg", "in/good.jpg"]
    bad = {row.path: row.error for row in rows if row.status == "error"}
    assert list(bad) == ["in/truncated.jpg", "in/empty.png", "in/text.jpg", "in/none.jpg"]
    assert "does not exist" in str(bad.pop("in/none.jpg"))
    assert all("cannot be decoded" in str(error) for error in bad.values())
    assert (summary["images"], summary["errors"]) == (7, 4)


@pytest.mark.usefixtures("ray_running")
def test_a_folder_without_one_good_image(broken: Path, tmp_path: Path) -> None:
    """Nothing reaches the model, and a name that is no UTF-8 reaches the table."""
    (broken.parent / "in" / "good.jpg").rename(broken.parent / "in" / "good.away")
    try:
        summary = run_batch(write_detector(tmp_path / "m.onnx"), broken.parent / "in", tmp_path / "r.parquet")
    finally:
        (broken.parent / "in" / "good.away").rename(broken.parent / "in" / "good.jpg")
    _, rows = read_results(tmp_path / "r.parquet")
    assert summary["errors"] == len(rows) == 4
    assert "latin-\ufffd.jpg" in [row.path for row in rows]


@pytest.mark.usefixtures("ray_running")
def test_a_job_that_is_stopped_leaves_no_file_and_no_actor(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(tables: Iterator[pa.Table], *_: object) -> int:
        next(tables)
        raise KeyboardInterrupt

    model = write_classifier(tmp_path / "m.onnx")
    monkeypatch.setattr(batch, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        run_batch(model, images, tmp_path / "out" / "r.parquet", batch_size=1)
    assert list((tmp_path / "out").iterdir()) == []
    wait_for_cpus()


@pytest.mark.usefixtures("ray_running")
def test_a_mistake_that_a_worker_finds_is_one_line(images: Path, tmp_path: Path) -> None:
    _, broken, artifact, _ = read_whole(write_classifier(tmp_path / "m.onnx"))
    for tensor in broken.graph.initializer:
        if tensor.name == "sixteen":
            tensor.CopyFrom(numpy_helper.from_array(np.array(np.nan, dtype=np.float32), "sixteen"))
    write_artifact(broken, artifact, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="^the model's logits are not finite"):
        run_batch(tmp_path / "m.onnx", images, tmp_path / "r.parquet")
    assert not (tmp_path / "r.parquet").exists()
    wait_for_cpus()
    with pytest.raises(InputError, match="2 actors with num_gpus=1 each, but Ray has 0 GPUs free"):
        run_batch(write_classifier(tmp_path / "m.onnx"), images, tmp_path / "r.parquet", actors=2, num_gpus=1)


@pytest.mark.usefixtures("ray_running")
def test_it_runs_where_others_hold_every_cpu(images: Path, tmp_path: Path) -> None:
    """As beside Ray Serve's replicas on a laptop."""
    import ray

    class Replica:
        def ready(self) -> bool:
            return True

    wait_for_cpus()
    replica: Any = ray.remote(num_cpus=2)(Replica).remote()
    assert ray.get(replica.ready.remote(), timeout=60)
    assert run_batch(write_classifier(tmp_path / "m.onnx"), images, tmp_path / "r.parquet", actors=2)["errors"] == 0
    ray.kill(replica)
    assert ray.is_initialized()


def test_mistakes_are_told_before_ray_starts(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> bool:
        raise AssertionError("Ray started")

    monkeypatch.setattr(batch, "start_ray", never)
    model, output = write_classifier(tmp_path / "m.onnx"), tmp_path / "r.parquet"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "file.csv").touch()
    for source, message in [
        ("empty", "no images .* below .*: is it the right folder"),
        ("missing", "no input at .*missing: give a folder"),
        ("empty.txt", "lists no images: write one path a line"),
        ("binary.txt", "give a text file in UTF-8"),
        ("file.csv", "is no image .* and no .txt file"),
    ]:
        with pytest.raises(InputError, match=message):
            run_batch(model, tmp_path / source, output)
    with pytest.raises(InputError, match="no artefact at .*none.onnx"):
        run_batch(tmp_path / "none.onnx", images, output)
    with pytest.raises(InputError, match="file.csv is empty: copy the file again"):
        run_batch(tmp_path / "file.csv", images, output)
    with pytest.raises(InputError, match="is a folder: name a file in it"):
        run_batch(model, images, tmp_path)
    with pytest.raises(InputError, match="cannot write .*choose another place"):
        run_batch(model, images, tmp_path / "file.csv" / "r.parquet")
    with pytest.raises(InputError, match="provider cuda does not go with num_gpus=0"):
        run_batch(model, images, output, provider="cuda")
    with pytest.raises(InputError, match="provider cpu does not go with num_gpus=0.5"):
        run_batch(model, images, output, provider="cpu", num_gpus=0.5)
    with pytest.raises(InputError, match="batch_size=0, actors=1, num_gpus=0: give at least"):
        run_batch(model, images, output, batch_size=0)
    assert not output.exists()


def test_a_single_image_is_an_input(images: Path) -> None:
    path = next(images.rglob("*.jpg"))
    assert [(file.name, file.source) for file in list_files(path)] == [(str(path), os.fsencode(path))]


def test_images_without_detections_read_back(tmp_path: Path) -> None:
    artifact = OnnxModel(write_detector(tmp_path / "m.onnx"), "cpu").metadata
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), size=(20, 30))
    table = to_table([Row("a.jpg", none), Row("b.jpg", None, "broken")], artifact)
    pq.write_table(table, tmp_path / "r.parquet")
    back, rows = read_results(tmp_path / "r.parquet")
    assert back == artifact
    assert bits(rows[0].result) == bits(none) and isinstance(rows[0].result, Detections)
    assert rows[0].result.boxes.shape == (0, 4)
    assert rows[1] == Row("b.jpg", None, "broken")


def test_foreign_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results at .*: make them with"):
        read_results(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(InputError, match="is no Parquet file"):
        read_results(tmp_path / "text.parquet")
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "foreign.parquet")
    with pytest.raises(InputError, match="holds no results of this project"):
        read_results(tmp_path / "foreign.parquet")


def test_it_never_imports_torch() -> None:
    code = "import sys, serving.batch, ray.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
