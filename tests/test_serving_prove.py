"""Answers of two places held side by side, the stage at which they part, and the whole command on a random network."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from artifacts import write_classifier, write_detector
from PIL import Image

from backbones import preprocess
from backbones.errors import InputError
from backbones.files import read_json, write_json
from detection.coco_eval import to_results
from serving import prove
from serving.artifact import Artifact, read_artifact
from serving.evaluate import ArtifactSource
from serving.jobs.results import Row
from serving.predictor import Classification, Detections
from serving.proof import measure
from serving.proof.agreement import Agreement, Bond, Disagreement, parting
from serving.proof.measure import Scoring
from serving.proof.memory import PeakMemory
from serving.proof.table import NEARLY
from serving.prove import ARTIFACT, BATCH, CHECKPOINT, ENDPOINT, INT8, run_prove
from serving.quantize import calibration_images
from serving.sessions.providers import driver_problem
from serving.shapes import draw_classification, draw_detection

WRITERS = {"classification": write_classifier, "detection": write_detector}
ORIENTATION = 0x0112


class Changed:
    """An artefact's answers with something done to them, or on the way to them."""

    def __init__(
        self,
        path: Path,
        before: Callable[[pytest.MonkeyPatch], object] = lambda _: None,
        after: Callable[[Row], Row] = lambda row: row,
    ):
        self._source, self._before, self._after = ArtifactSource(path, "cpu"), before, after
        self.name, self.metadata = "changed", self._source.metadata

    def rows(self, paths: Sequence[Path]) -> Iterator[Row]:
        with pytest.MonkeyPatch.context() as patch:
            self._before(patch)
            rows = [*self._source.rows(paths)]
        yield from map(self._after, rows)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A JPEG on its side, with nothing in it that turning or resizing would leave alone."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    noise[:, :75, 0] = 255
    noise[:30, :, 1] = 0
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(noise).save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def as_it_lies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(preprocess, "_upright", lambda image: image)


def in_blue(patch: pytest.MonkeyPatch) -> None:
    """A JPEG decoder that takes red for blue, as one that gives BGR."""

    upright = preprocess._upright

    def swap(image: Image.Image) -> Image.Image:
        turned, jpeg = upright(image), image.format == "JPEG"
        return Image.merge("RGB", turned.split()[::-1]) if jpeg else turned

    patch.setattr(preprocess, "_upright", swap)


def by_nearest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(preprocess, "resampling", lambda _: Image.Resampling.NEAREST)


def surer(row: Row) -> Row:
    if isinstance(row.result, Classification):
        return replace(row, result=replace(row.result, probabilities=row.result.probabilities + np.float32(0.01)))
    assert isinstance(row.result, Detections)
    return replace(row, result=replace(row.result, scores=row.result.scores + np.float32(0.01)))


def misnamed(row: Row) -> Row:
    assert isinstance(row.result, Classification)
    return replace(row, result=replace(row.result, indices=np.roll(row.result.indices, 1)))


def shifted(row: Row) -> Row:
    assert isinstance(row.result, Detections)
    return replace(row, result=replace(row.result, boxes=row.result.boxes + np.float32(0.5)))


@pytest.mark.parametrize(
    ("task", "before", "after", "stage"),
    [
        ("classification", in_blue, None, "decode"),
        ("classification", by_nearest, None, "resize"),
        ("classification", None, surer, "graph"),
        ("classification", None, misnamed, "post-processing"),
        ("detection", as_it_lies, None, "decode"),
        ("detection", None, surer, "graph"),
        ("detection", None, shifted, "post-processing"),
    ],
)
@pytest.mark.parametrize("bond", ["exact", "near"])
def test_the_stage_at_which_two_places_part(photo, tmp_path, task, before, after, stage, bond: Bond) -> None:
    artifact = WRITERS[task](tmp_path / "m.onnx")
    expected = ArtifactSource(artifact, "cpu")
    changed = {"before": before, "after": after}
    found = Changed(artifact, **{name: change for name, change in changed.items() if change is not None})
    agreement = Agreement(expected.metadata, bond)
    agreement.add(*expected.rows([photo]), *found.rows([photo]))
    assert agreement.culprit == str(photo)
    assert parting(expected, found, photo, bond, tmp_path / "parted") == stage


def test_the_same_answers_agree(photo, tmp_path) -> None:
    for write in WRITERS.values():
        source = ArtifactSource(write(tmp_path / "m.onnx"), "cpu")
        agreement = Agreement(source.metadata, "exact")
        agreement.add(*source.rows([photo]), *source.rows([photo]))
        assert agreement.culprit is None and agreement.images == 1
        assert set(agreement.largest.values()) == {0.0}


def test_rounding_is_near_and_not_exact(photo, tmp_path) -> None:
    source = ArtifactSource(write_classifier(tmp_path / "m.onnx"), "cpu")
    (row,) = source.rows([photo])
    assert isinstance(row.result, Classification)
    rounded = replace(row, result=replace(row.result, probabilities=np.nextafter(row.result.probabilities, 0)))
    verdicts = {}
    for bond in ("exact", "near", "free"):
        agreement = Agreement(source.metadata, bond)  # type: ignore[arg-type]
        agreement.add(row, rounded)
        verdicts[bond] = agreement.culprit
    assert verdicts == {"exact": str(photo), "near": None, "free": None}


def test_nothing_is_worse_than_no_number(photo, tmp_path) -> None:
    source = ArtifactSource(write_classifier(tmp_path / "m.onnx"), "cpu")
    (row,) = source.rows([photo])
    assert isinstance(row.result, Classification)
    broken = replace(row, path="b", result=replace(row.result, probabilities=row.result.probabilities * np.nan))
    agreement = Agreement(source.metadata, "near")
    for found in (row, broken, row):
        agreement.add(replace(row, path=found.path), found)
    assert agreement.culprit == "b"


def test_an_error_on_one_side_alone(tmp_path) -> None:
    metadata = ArtifactSource(write_classifier(tmp_path / "m.onnx"), "cpu").metadata
    right = Row("a.jpg", Classification(np.array([0]), np.array([1], np.float32)))
    wrong = Row("a.jpg", None, "broken")
    one, both = Agreement(metadata, "near"), Agreement(metadata, "near")
    one.add(right, wrong)
    both.add(wrong, wrong)
    assert (one.culprit, both.culprit) == ("a.jpg", None)


def test_lone_detections_are_counted(tmp_path) -> None:
    metadata = ArtifactSource(write_detector(tmp_path / "m.onnx"), "cpu").metadata
    boxes = np.array([[0, 0, 8, 8], [40, 40, 60, 60]], np.float32)
    whole = Row("a.jpg", Detections(boxes, np.array([0.9, 0.8], np.float32), np.array([0, 1]), (64, 64)))
    assert isinstance(whole.result, Detections)
    fewer = replace(whole, result=Detections(boxes[1:], whole.result.scores[1:], np.array([1]), (64, 64)))
    agreement = Agreement(metadata, "near")
    agreement.add(whole, fewer)
    assert (agreement.unmatched, agreement.culprit) == (1, "a.jpg")


def test_peak_memory_of_children(tmp_path) -> None:
    with PeakMemory() as peak:
        subprocess.run([sys.executable, "-c", "import time; held = b'x' * 200_000_000; time.sleep(1)"], check=True)
    assert peak.bytes is not None and 200e6 < peak.bytes < 400e6


def test_what_is_no_data_for_the_weights(exported, nowhere, tmp_path) -> None:
    weights = str(exported("classifier").with_name("w.safetensors"))
    for name, words in (("coco.json", "holds a classifier"), ("data.zip", "data.zip is no data set: give a config")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match=words):
            run_prove(weights, str(tmp_path / name), output=str(tmp_path / "out"))
    nowhere.setattr(prove, "run_export", lambda *_, **__: pytest.fail("it was exported first"))
    with pytest.raises(InputError, match="no data at nowhere"):
        run_prove(weights, "nowhere", output=str(tmp_path / "out"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    draw_classification(root, {"train": 8, "val": 8}, seed=0)
    for split in ("train", "val"):
        shutil.rmtree(root / split / "triangle")  # the network has three classes
    return root


def annotate(root: Path, artifact: Path) -> Path:
    """Annotations of `root / "val"` by which every third detection of an artefact is right."""
    source: Any = ArtifactSource(artifact, "cpu")
    images = read_json(root / "val.json")["images"]
    found: list[dict[str, Any]] = []
    for image, row in zip(images, source.rows([root / "val" / image["file_name"] for image in images]), strict=True):
        categories = [source.metadata.category_ids[i] for i in row.result.indices]
        found += to_results(image["id"], row.result.boxes, row.result.scores, categories)
    truth = [{key: one[key] for key in ("image_id", "category_id", "bbox")} for one in found[::3]]
    known = zip(source.metadata.category_ids, source.metadata.classes, strict=True)
    categories = [{"id": number, "name": name} for number, name in known]
    write_json(root / "truth.json", {"images": images, "categories": categories, "annotations": truth})
    return root / "truth.json"


def exported_before(weights: str, artifact: Path, model: str | None) -> Artifact:
    shutil.copy(Path(weights).with_name("m.onnx"), artifact)
    return read_artifact(artifact)[0]


def not_quantized(artifact: Path, int8: Path, scoring: Scoring, calibration: str | None) -> None:
    metadata = read_artifact(artifact)[0]
    sources, where = calibration_images(scoring.config, scoring.overrides, metadata, calibration, None)
    assert sources and calibration in (None, where)
    shutil.copy(artifact, int8)


@pytest.fixture
def nowhere(monkeypatch) -> pytest.MonkeyPatch:
    """Nothing that takes minutes: for service and batch job the artefact, or what a test puts there, for the INT8
    artefact a copy of it, and no process for a place.
    """
    monkeypatch.setattr(prove, "run_export", exported_before)
    monkeypatch.setattr(prove, "_quantize", not_quantized)
    monkeypatch.setattr(prove, "alone", lambda work: work())
    monkeypatch.setattr(prove, "measure_alone", measure._measure_here)
    monkeypatch.setattr(prove, "start", lambda config, _: nullcontext(SimpleNamespace(url=config.models[0].artifact)))
    monkeypatch.setattr(prove, "EndpointSource", lambda url: ArtifactSource(Path(url).parents[2], "cpu"))
    monkeypatch.setattr(prove, "BatchSource", lambda artifact, *_: ArtifactSource(artifact, "cpu"))
    return monkeypatch


@pytest.mark.slow
def test_one_number_of_a_detector(exported, nowhere, tmp_path) -> None:
    """Its service and job are held against the artefact in test_serving_evaluate.py, its INT8 in _quantize.py."""
    draw_detection(tmp_path, {"train": 3, "val": 5}, seed=1, size=160)
    artifact, images = exported("fcos"), tmp_path / "val"
    data, calibration = annotate(tmp_path, artifact), str(tmp_path / "train")
    weights, output = str(artifact.with_name("w.safetensors")), str(tmp_path / "out")
    result = run_prove(weights, str(data), images=str(images), calibration=calibration, output=output)
    metrics = check(result, {"scores": 0.0, "boxes": 0.0})
    assert 0 < metrics[CHECKPOINT] < 1


def check(result: dict[str, Any], same: dict[str, float]) -> dict[str, float]:
    """All places are there and agree; the metric of each but INT8."""
    assert list(result["places"]) == [CHECKPOINT, ARTIFACT, INT8, ENDPOINT, BATCH]
    metrics = {name: place["metric"] for name, place in result["places"].items() if name != INT8}
    assert max(metrics.values()) - min(metrics.values()) <= NEARLY
    assert metrics[ARTIFACT] == metrics[ENDPOINT] == metrics[BATCH]
    for name in (ENDPOINT, BATCH):
        assert result["places"][name]["largest"] == same
    return metrics


def test_one_number(exported, shapes, tmp_path, capsys) -> None:
    weights = exported("classifier").with_name("w.safetensors")
    result = run_prove(str(weights), str(shapes), output=str(tmp_path))
    metrics = check(result, {"logits": 0.0, "scores": 0.0})
    assert metrics[CHECKPOINT] == metrics[ARTIFACT]
    assert result["places"][INT8]["largest"]["scores"] > 0  # eight bits are another number
    assert all(place["peak_bytes"] > 50e6 and place["images_per_s"] > 0 for place in result["places"].values())
    peaks = {name: place["peak_bytes"] for name, place in result["places"].items()}
    assert result["provider"] != "cpu" or peaks[ARTIFACT] < 0.7 * peaks[CHECKPOINT]  # without PyTorch or this process
    assert json.loads((tmp_path / "prove.json").read_text())["places"] == result["places"]
    assert result["provider"] == "cpu" or driver_problem() is None
    printed = capsys.readouterr().out
    assert printed.count(f"{metrics[CHECKPOINT]:.4f}") >= 4 and "one number" in printed
    assert (tmp_path / "prove.md").read_text().count("\n") == 2 + len(result["places"])


def test_an_endpoint_that_answers_otherwise_fails_the_command(exported, shapes, nowhere, tmp_path) -> None:
    """One that resizes in another way."""
    nowhere.setattr(prove, "EndpointSource", lambda _: Changed(tmp_path / "model.onnx", by_nearest))
    with pytest.raises(Disagreement, match="endpoint, Ray Serve and artefact part at resize"):
        run_prove(str(exported("classifier").with_name("w.safetensors")), str(shapes), output=str(tmp_path))
    assert json.loads((tmp_path / "prove.json").read_text())["places"][ENDPOINT]["agrees"] is False
