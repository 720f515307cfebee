"""Masks on their way from the graph to the wire and to Parquet, and artefacts that are no detectors yet."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from artifacts import BOXES, SCORES, write_detector
from jobs import job
from mask_artifacts import write_masks, write_raw
from PIL import Image

from backbones.errors import InputError
from detection.masks import PastedMasks, decode
from serving.api.schemas import detect_answer, parse_detect
from serving.artifact import DetectorArtifact
from serving.batch import run_batch
from serving.evaluate import ArtifactSource
from serving.jobs.results import Row, read_results, to_table
from serving.predictor import Detections, Detector, create_predictor
from serving.runtime import OnnxModel
from serving.service.applications import check_artifact

H, W = 200, 300


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    model = OnnxModel(write_masks(tmp_path_factory.mktemp("masks") / "m.onnx"), "cpu")
    found = create_predictor(model)
    assert isinstance(found, Detector)
    return found


@pytest.fixture(scope="module")
def found(detector: Detector) -> Detections:
    buffer = io.BytesIO()
    Image.new("RGB", (W, H)).save(buffer, "PNG")
    return detector.predict([detector.prepare(buffer.getvalue())])[0]


def test_masks_lie_in_the_original(found: Detections) -> None:
    assert found.masks is not None and len(found.masks) == len(found.scores) == len(SCORES)
    first, second = (decode(run, H, W) for run in found.masks)
    x1, y1, x2, y2 = np.array(BOXES[0]) * (W, H, W, H)
    expected = np.zeros((H, W), np.uint8)
    expected[int(y1) : int(y1 + y2) // 2, int(x1) : int(x1 + x2) // 2] = 1
    assert (first != expected).mean() < 0.01  # a mask's edge lies between two of its 28 values
    expected[:] = 0
    expected[H // 2 :, : W // 2] = 1
    assert (second != expected).mean() < 0.02


def test_an_answer_has_the_masks_that_were_asked_for(detector: Detector, found: Detections) -> None:
    answer = detect_answer(detector.metadata, found)
    back = parse_detect(json.loads(json.dumps(answer)), detector.metadata)
    assert back.masks == list(found.masks or ())
    np.testing.assert_array_equal(back.boxes, found.boxes)
    assert answer["detections"][0]["segmentation"]["size"] == [H, W]


def test_a_mask_below_the_threshold_is_not_pasted(
    detector: Detector, found: Detections, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    paste = PastedMasks.__getitem__
    monkeypatch.setattr(PastedMasks, "__getitem__", lambda self, k: (asked.append(k), paste(self, k))[1])
    assert len(detect_answer(detector.metadata, found, score_threshold=0.7)["detections"]) == 1
    assert asked == [0]


def test_without_masks_answers_and_tables_have_none(tmp_path: Path, found: Detections) -> None:
    artifact = OnnxModel(write_detector(tmp_path / "m.onnx"), "cpu").metadata
    assert isinstance(artifact, DetectorArtifact)
    boxes = Detections(found.boxes, found.scores, found.indices, found.size)
    answer = detect_answer(artifact, boxes)
    assert not any("segmentation" in row for row in answer["detections"])
    assert parse_detect(answer, artifact).masks is None
    assert "segmentations" not in to_table([Row("a.jpg", boxes)], artifact).column_names


def test_masks_survive_parquet(detector: Detector, found: Detections, tmp_path: Path) -> None:
    none = Detections(found.boxes[:0], found.scores[:0], found.indices[:0], found.size, [])
    rows = [Row("a.jpg", found), Row("b.jpg", None, "broken"), Row("c.jpg", none)]
    pq.write_table(to_table(rows, detector.metadata), tmp_path / "r.parquet")
    back, (first, broken, empty) = read_results(tmp_path / "r.parquet")
    assert back == detector.metadata
    assert isinstance(first.result, Detections) and isinstance(empty.result, Detections)
    assert first.result.masks == list(found.masks or ())
    assert (broken, empty.result.masks) == (rows[1], [])


def test_raw_heads_are_refused_everywhere(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw.onnx")
    Image.new("RGB", (W, H)).save(tmp_path / "image.png")
    refused = "raw heads, not detections: export without --no-nms"
    with pytest.raises(InputError, match=refused):
        create_predictor(OnnxModel(raw, "cpu"))
    with pytest.raises(InputError, match=f"model 'm': .*{refused}"):
        check_artifact("m", str(raw))
    with pytest.raises(InputError, match=refused):
        run_batch(job(raw, tmp_path / "image.png", tmp_path / "out"))
    with pytest.raises(InputError, match=refused):
        ArtifactSource(raw, "cpu")
