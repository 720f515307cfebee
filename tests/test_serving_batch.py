"""The batch job: rows are the predictor's own, broken files are rows, and mistakes are told before Ray starts."""

import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import BOXES, COLOURS, picture, write_classifier, write_detector
from jobs import job
from onnx import numpy_helper
from PIL import Image

from backbones.config import load_config
from backbones.errors import InputError
from backbones.files import write_json
from backbones.preprocess import decode
from detection.coco_eval import read_results as read_coco_results
from serving import batch
from serving.__main__ import main
from serving.artifact import read_whole, write_artifact
from serving.batch import run_batch
from serving.jobs.config import BatchConfig
from serving.jobs.results import Row, read_results, to_table
from serving.predictor import Classification, Detections, create_predictor
from serving.ray_start import start_ray
from serving.runtime import OnnxModel

ROOT = Path(__file__).parents[1]
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
        noise = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1
        path = root / ("a", "b/c", ".")[i % 3] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise.save(path, exif=exif)
    return root


@pytest.fixture(scope="module")
def broken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of three good images and four that cannot be read; its folder has a fifth."""
    root = tmp_path_factory.mktemp("broken")
    whole = (images / "a" / "00.jpg").read_bytes()
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
    ("batch_size", "actors", "decode", "part_rows"),
    [(1, 1, "actors", 512), (4, 2, "actors", 5), (3, 1, "tasks", 4)],
)
def test_rows_are_the_predictors_own(images: Path, tmp_path: Path, batch_size, actors, decode, part_rows) -> None:
    """Of two models over one pass of decoding, whatever the batches, actors, parts and the place of decoding."""
    models = {"c": write_classifier(tmp_path / "c.onnx"), "d": write_detector(tmp_path / "d.onnx")}
    values = {"batch_size": batch_size, "actors": {"min_actors": actors}, "decode": decode, "part_rows": part_rows}
    summary = run_batch(job(models, images, tmp_path / "out", **values))
    assert (summary["images"], summary["errors"], summary["predicted"]) == (13, 0, 13)
    assert summary["images_per_s"] > 0 and summary["start_s"] > 0
    paths = [path.relative_to(images).as_posix() for path in sorted(images.rglob("*.jpg"))]
    for name, model in models.items():
        predictor: Any = create_predictor(OnnxModel(model, "cpu"))
        artifact, rows = read_results(tmp_path / "out" / name)
        assert artifact == predictor.metadata
        assert [row.path for row in rows] == paths
        for row in rows:
            expected = predictor.predict([predictor.prepare(images / row.path)])[0]
            assert bits(row.result) == bits(expected), row.path
        parts = sorted((tmp_path / "out" / name).glob("*.parquet"))
        assert [len(pq.read_table(part)) for part in parts] == [part_rows] * (13 // part_rows) + [13 % part_rows]
        table = pa.concat_tables(map(pq.read_table, parts))
        assert set(table["artifact_sha256"].to_pylist()) == {read_whole(model).sha256}
        assert min(table["decode_ms"].to_pylist()) > 0 and min(table["run_ms"].to_pylist()) > 0
        labels = [[artifact.classes[i] for i in row] for row in table["indices"].to_pylist()]
        assert table["labels"].to_pylist() == labels


@pytest.mark.usefixtures("ray_running")
def test_broken_files_are_rows_in_their_place(broken: Path, tmp_path: Path) -> None:
    config = job(write_classifier(tmp_path / "m.onnx"), broken, tmp_path / "out", batch_size=4)
    summary = run_batch(config)
    _, rows = read_results(tmp_path / "out" / "m")
    good = [row.path for row in rows if row.status == "ok"]
    assert good == ["in/good.jpg", f"{broken.parent}/in/good.jpg", "in/good.jpg"]
    bad = {row.path: row.error for row in rows if row.status == "error"}
    assert list(bad) == ["in/truncated.jpg", "in/empty.png", "in/text.jpg", "in/none.jpg"]
    assert [row["path"] for row in summary["failed"]] == list(bad)
    assert "does not exist" in str(bad.pop("in/none.jpg"))
    assert all("cannot be decoded" in str(error) for error in bad.values())
    assert (summary["images"], summary["errors"]) == (7, 4)
    again = run_batch(config)
    assert (again["images"], again["errors"], again["predicted"]) == (7, 4, 0)
    with pytest.raises(InputError, match=r"in/truncated.jpg: .*cannot be decoded.*\(on_error=row would note it"):
        run_batch(job(tmp_path / "m.onnx", broken, tmp_path / "f", on_error="fail"))
    assert not list((tmp_path / "f").glob("**/part*"))


@pytest.mark.usefixtures("ray_running")
def test_a_folder_without_one_good_image(broken: Path, tmp_path: Path) -> None:
    """Nothing reaches the model, and a name that is no UTF-8 reaches the table."""
    (broken.parent / "in" / "good.jpg").rename(broken.parent / "in" / "good.away")
    try:
        summary = run_batch(job(write_detector(tmp_path / "m.onnx"), broken.parent / "in", tmp_path / "out"))
    finally:
        (broken.parent / "in" / "good.away").rename(broken.parent / "in" / "good.jpg")
    _, rows = read_results(tmp_path / "out" / "m")
    assert summary["errors"] == len(rows) == 4
    assert "latin-\ufffd.jpg" in [row.path for row in rows]


@pytest.mark.usefixtures("ray_running")
def test_too_many_errors_end_the_job(images: Path, tmp_path: Path) -> None:
    lines = [str(images / "a" / "00.jpg"), "none.jpg"] * 100
    (tmp_path / "list.txt").write_text("\n".join(lines))
    config = job(write_classifier(tmp_path / "m.onnx"), tmp_path / "list.txt", tmp_path / "out", part_rows=16)
    for _ in range(2):  # the second start counts what the first has seen
        message = r"(\d+) of \d+ images failed, over max_error_share=0.3, such as none.jpg: .* does not exist"
        with pytest.raises(InputError, match=message):
            run_batch(config.model_copy(update={"max_error_share": 0.3}))
        assert 0 < len(list((tmp_path / "out" / "m").iterdir())) < 13
    assert run_batch(config)["errors"] == 100
    assert len(read_results(tmp_path / "out" / "m")[1]) == 200


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """COCO annotations of four images; the detector's first box is the only object of each."""
    sizes = [(60, 40), (80, 80), (50, 70), (64, 64)]
    (tmp_path / "coco").mkdir()
    for i, size in enumerate(sizes):
        (tmp_path / "coco" / f"{i}.png").write_bytes(picture(COLOURS[i % 3], size))
    x1, y1, x2, y2 = BOXES[0]
    truth = {
        "images": [{"id": 7 * i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": 7 * i, "category_id": 18, "bbox": [x1 * w, y1 * h, (x2 - x1) * w, (y2 - y1) * h]}
            for i, (w, h) in enumerate(sizes)
        ],
    }  # fmt: skip
    write_json(tmp_path / "coco" / "truth.json", truth)
    return tmp_path / "coco" / "truth.json"


@pytest.mark.usefixtures("ray_running")
def test_coco_annotations_give_ids_files_and_scores(annotated: Path, tmp_path: Path) -> None:
    config = job(write_detector(tmp_path / "d.onnx"), annotated, tmp_path / "out", annotated=True)
    written = {}
    for suffix in ("json", "jsonl", "csv", "parquet"):
        path = written[suffix] = tmp_path / f"r.{suffix}"
        models = (config.models[0].model_copy(update={"results": str(path)}),)
        summary = run_batch(config.model_copy(update={"models": models}))
    assert summary["models"]["m"]["metrics"]["AP50"] == 1
    assert summary["models"]["m"]["labels"] == {"dog": 4, "cat": 4}
    found = read_coco_results(written["json"])
    assert [row["image_id"] for row in found] == [0, 0, 7, 7, 14, 14, 21, 21]
    assert found[0] == {"image_id": 0, "category_id": 18, "bbox": [15, 10, 30, 20], "score": pytest.approx(0.9)}
    lines = [json.loads(line) for line in written["jsonl"].read_text().splitlines()]
    assert lines == pa.concat_tables([pq.read_table(written["parquet"])]).to_pylist()
    with open(written["csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image_id"], row["label"]) for row in rows[:3]] == [("0", "dog"), ("0", "cat"), ("7", "dog")]
    assert [float(rows[0][side]) for side in ("x1", "y1", "x2", "y2")] == [15, 10, 45, 30]
    drawn = [decode(path).size for path in sorted((tmp_path / "out" / "m" / "annotated").iterdir())]
    assert drawn == [(60, 40), (80, 80), (50, 70), (64, 64)]
    text = (tmp_path / "out" / "index.html").read_text()
    assert "AP50" in text and "contact" not in text and "http" not in text and 'src="data:image/' in text
    assert sorted(path.name for path in (tmp_path / "out" / "m").iterdir()) == [
        "annotated", "contact_sheet.jpg", "histograms.png", "part-000000.parquet"
    ]  # fmt: skip


@pytest.mark.usefixtures("ray_running")
def test_class_folders_give_top1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, folder in enumerate(["red", "green", "blue", "blue"]):
        (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / folder / f"{i}.png").write_bytes(picture(COLOURS[i % 3]))  # the last is red
    (tmp_path / "in" / "red" / "broken.png").write_bytes(b"")
    model = write_classifier(tmp_path / "m.onnx")
    overrides = [
        f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "labels=folder", f"models.0.artifact={model}",
        f"models.1.artifact={write_detector(tmp_path / 'd.onnx')}",
    ]  # fmt: skip
    main(["batch", str(ROOT / "configs/batch/local.yaml"), *overrides])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path / 'out'}: 5 images, 1 errors, 5 predicted now")
    assert said[1] == "classifier: top1 0.6000, top5 0.8000"
    metrics = json.loads((tmp_path / "out" / "summary.json").read_text())["models"]["classifier"]["metrics"]
    assert metrics["per_class"]["red"] == {"images": 2, "top1": 0.5, "top5": 0.5}
    (tmp_path / "in" / "red").rename(tmp_path / "in" / "rot")
    with pytest.raises(InputError, match="rot is none of the model's classes, red, green, blue"):
        run_batch(job(model, tmp_path / "in", tmp_path / "o", labels="folder"))


@pytest.mark.usefixtures("ray_running")
def test_an_output_of_another_job_is_refused(images: Path, tmp_path: Path) -> None:
    model, output = write_classifier(tmp_path / "m.onnx"), tmp_path / "out"
    run_batch(job(model, images / "a", output))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    (tmp_path / "list.txt").write_text("\n".join(str(path) for path in sorted((images / "a").iterdir())))
    other_model = write_classifier(tmp_path / "other.onnx", crop=16)
    other = job(other_model, images / "a", output)
    for config, message in [
        (other, r"out holds results of another artefact m, \w{12} and not \w{12}: name another output"),
        (job(model, images, output), "holds results of another number of images, 5 and not 13: name"),
        (job(model, tmp_path / "list.txt", output), r"holds results of another input, \w{12} and not"),
        (job(model, images / "a", output, part_rows=9), "holds results of another part_rows, 512 and not 9: name"),
        (job({"other": other_model}, images / "a", output), r"another artefact m, \w{12} and not None: name"),
        (job(model, images / "a", tmp_path), "holds other files, such as list.txt: name a new folder"),
    ]:
        with pytest.raises(InputError, match=message):
            run_batch(config)
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with batch.Output(output, ["m"], 512).locked(), pytest.raises(InputError, match="another job writes to"):
        run_batch(job(model, images / "a", output))


@pytest.mark.usefixtures("ray_running")
def test_a_full_disk_is_one_line_and_the_job_goes_on_later(images: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it, between those of a part of errors and of one of detections. A part
    that is written again has other times in it, and so another size: by far less than half."""
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    paths = [tmp_path / "broken.jpg"] * 500 + sorted(images.rglob("*.jpg")) * 40
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    model, settings = write_detector(tmp_path / "m.onnx"), {"part_rows": 500, "max_error_share": 1}
    config = job(model, tmp_path / "list.txt", tmp_path / "out", **settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run_batch(job(model, tmp_path / "list.txt", tmp_path / "size", **settings))
    small, large = (part.stat().st_size for part in sorted((tmp_path / "size" / "m").glob("part*"))[:2])
    resource.setrlimit(resource.RLIMIT_FSIZE, ((small + large) // 2, hard))
    try:
        with pytest.raises(InputError, match="^cannot write below .*out: File too large; what is finished is kept"):
            run_batch(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"job.json", "inputs.parquet", ".lock", "part-000000.parquet"}
    assert run_batch(config)["predicted"] == len(paths) - 500
    for one, other in zip(*(read_results(tmp_path / name / "m")[1] for name in ("out", "size")), strict=True):
        assert (one.path, one.error) == (other.path, other.error)
        assert one.error or bits(one.result) == bits(other.result)


@pytest.mark.usefixtures("ray_running")
def test_a_job_that_is_stopped_leaves_no_half_part_and_no_actor(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(tables: Iterator[list[pa.Table]], *_: object) -> tuple[float, int]:
        next(tables)
        raise KeyboardInterrupt

    model = write_classifier(tmp_path / "m.onnx")
    monkeypatch.setattr(batch, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        run_batch(job(model, images, tmp_path / "out", batch_size=1))
    left = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert left == [".lock", "inputs.parquet", "job.json"]
    wait_for_cpus()


@pytest.mark.usefixtures("ray_running")
def test_a_mistake_that_a_worker_finds_is_one_line(images: Path, tmp_path: Path) -> None:
    _, broken, artifact, _ = read_whole(write_classifier(tmp_path / "m.onnx"))
    for tensor in broken.graph.initializer:
        if tensor.name == "sixteen":
            tensor.CopyFrom(numpy_helper.from_array(np.array(np.nan, dtype=np.float32), "sixteen"))
    write_artifact(broken, artifact, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="^the model's logits are not finite"):
        run_batch(job(tmp_path / "m.onnx", images, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("**/part*"))
    wait_for_cpus()
    with pytest.raises(InputError, match="2 actors with num_gpus=1 each, but Ray has 0 GPUs free"):
        gpus = {"min_actors": 2, "num_gpus": 1}
        run_batch(job(write_classifier(tmp_path / "m.onnx"), images, tmp_path / "g", actors=gpus))


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
    config = job(write_classifier(tmp_path / "m.onnx"), images, tmp_path / "out", actors={"min_actors": 2})
    assert run_batch(config)["errors"] == 0
    ray.kill(replica)
    assert ray.is_initialized()


def test_mistakes_are_told_before_ray_starts(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> bool:
        raise AssertionError("Ray started")

    monkeypatch.setattr(batch, "start_ray", never)
    model, output = write_classifier(tmp_path / "m.onnx"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "file.onnx").touch()
    (tmp_path / "columns.csv").write_text("file,label\na.jpg,red\n")
    for source, message in [
        ("empty", "no images .* in .*empty: is it the right folder"),
        ("missing", "no input at .*missing: give a folder"),
        ("empty.txt", "no images .* in .*empty.txt: is it .* an empty list"),
        ("binary.txt", "give a text file in UTF-8"),
        ("file.onnx", "is no image .*, no list of paths"),
        ("columns.csv", "columns.csv has no column path but file, label: rename one of them"),
    ]:
        with pytest.raises(InputError, match=message):
            run_batch(job(model, tmp_path / source, output))
    with pytest.raises(InputError, match="no artefact at .*none.onnx"):
        run_batch(job(tmp_path / "none.onnx", images, output))
    with pytest.raises(InputError, match="file.onnx is empty: copy the file again"):
        run_batch(job(tmp_path / "file.onnx", images, output))
    with pytest.raises(InputError, match="is a file: name a folder for the job's parts"):
        run_batch(job(model, images, tmp_path / "file.onnx"))
    with pytest.raises(InputError, match="cannot write .*choose another place"):
        run_batch(job(model, images, tmp_path / "file.onnx" / "out"))
    as_coco = [{"name": "m", "artifact": str(model), "results": "r.json"}]
    with pytest.raises(InputError, match="COCO's results are of detectors, on images with ids"):
        run_batch(job(model, images, output, models=as_coco))
    assert not output.exists()
    (tmp_path / "bad.json").write_text(
        '{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1}], '
        '"annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]}'
    )
    with pytest.raises(InputError, match="boxes and the annotations have no category id in common"):
        run_batch(job(write_detector(tmp_path / "d.onnx"), tmp_path / "bad.json", output))
    assert not output.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.0.provider=cuda", "provider cuda does not go with num_gpus=0"),
        ("batch_size=0", "batch_size=0: Input should be greater than or equal to 1"),
        ("actors.max_actors=0", "actors.max_actors=0: Input should"),
        ("actors={min_actors: 3, max_actors: 2}", "max_actors 2 is below min_actors 3"),
        ("models.1.name=classifier", "two models are named 'classifier'"),
        ("models.0.results=a.xml", "models.0.results='a.xml': no such format: end it in one of .json, .jsonl"),
        ("part_row=3", "unknown key 'part_row': did you mean 'part_rows'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(BatchConfig, ROOT / "configs/batch/local.yaml", [override])


@pytest.mark.parametrize("other", ["models.1.results=./a.csv", "input=a.csv"])
def test_results_replace_nothing(other: str) -> None:
    with pytest.raises(InputError, match="results would replace another model's, or the input: .*a.csv"):
        load_config(BatchConfig, ROOT / "configs/batch/local.yaml", ["models.0.results=a.csv", other])


def test_every_config_is_read() -> None:
    configs = sorted((ROOT / "configs/batch").glob("*.yaml"))
    assert [load_config(BatchConfig, path).models[0].name for path in configs] == ["detector", "classifier"]


def test_images_without_detections_read_back(tmp_path: Path) -> None:
    artifact = OnnxModel(write_detector(tmp_path / "m.onnx"), "cpu").metadata
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), size=(20, 30))
    table = to_table([Row("a.jpg", none), Row("b.jpg", None, "broken", 3, 1.5)], artifact)
    pq.write_table(table, tmp_path / "r.parquet")
    back, rows = read_results(tmp_path / "r.parquet")
    assert back == artifact
    assert bits(rows[0].result) == bits(none) and isinstance(rows[0].result, Detections)
    assert rows[0].result.boxes.shape == (0, 4)
    assert rows[1] == Row("b.jpg", None, "broken", 3, 1.5)


def test_foreign_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results at .*: make them with"):
        read_results(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(InputError, match="is no Parquet file"):
        read_results(tmp_path / "text.parquet")
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "foreign.parquet")
    with pytest.raises(InputError, match="holds no results of this project"):
        read_results(tmp_path / "foreign.parquet")
    (tmp_path / "out" / "detector").mkdir(parents=True)
    (tmp_path / "out" / "detector" / "part-000000.parquet").touch()
    with pytest.raises(InputError, match="no results at .*out: name a model's folder in it, detector"):
        read_results(tmp_path / "out")


def test_it_never_imports_torch() -> None:
    code = "import sys, serving.batch, ray.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
