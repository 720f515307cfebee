from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import CROP, classifier_weights
from PIL import Image

import serving.export
from backbones.cspnet import create_model
from backbones.errors import InputError
from serving.artifact import SCHEMA_VERSION, from_metadata, to_metadata
from serving.export import run_export
from serving.runtime import OnnxModel

FAMILIES = ("fcos", "retinanet", "fasterrcnn")


@pytest.fixture(scope="module")
def classifier(exported) -> Path:
    return exported("classifier")


def test_classifier_says_what_it_is(classifier):
    model = OnnxModel(classifier)
    about = model.metadata
    assert (about.task, about.model, about.classes) == ("classification", "cspresnet10", ("circle", "cross", "square"))
    assert about.preprocess == CROP
    assert about.config == {"seed": 7}
    assert len(about.weights_sha256) == 64
    assert about.parity.batch_sizes == (1, 3)
    assert 0 <= about.parity.largest["logits"] < 1e-5
    assert model.inputs == {"images": ("tensor(uint8)", ["N", "H", "W", 3])}
    assert {name: shape for name, (_, shape) in model.outputs.items()} == {
        "logits": ["N", 3], "probabilities": ["N", 3],
    }  # fmt: skip


def test_classifier_runs_any_batch_and_size_and_sums_to_one(classifier):
    model = OnnxModel(classifier)
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)
    outputs = model.run(images=images)
    np.testing.assert_allclose(outputs["probabilities"].sum(1), 1, rtol=1e-6)
    alone = np.concatenate([model.run(images=images[i : i + 1])["logits"] for i in range(5)])
    np.testing.assert_allclose(alone, outputs["logits"], rtol=1e-5, atol=1e-6)


def test_files_hold_no_paths_of_whoever_exported(classifier):
    content = classifier.read_bytes()
    for path in (Path(torch.__file__).parent, Path(__file__).parents[1], classifier.parent):
        assert str(path).encode() not in content


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_detector_of_every_family(exported, family):
    path = exported(family)
    assert "largest difference from PyTorch" in (path.parent / "said.txt").read_text()
    model = OnnxModel(path)
    about = model.metadata
    assert (about.classes, about.category_ids) == (("cat", "dog"), (5, 90))
    assert (about.score_threshold, about.max_detections) == (0.2, 30)
    assert about.parity.detections > 10
    assert about.parity.largest["boxes"] < 0.05
    assert model.outputs["boxes"][1] == ["N", 30, 4]


def test_a_graph_that_differs_is_not_written(classifier, tmp_path, monkeypatch):
    """As if tracing had gone wrong: the graph is another network's."""
    monkeypatch.setattr(serving.export, "_trace", lambda *_: onnx.load(classifier))
    torch.manual_seed(1)
    weights = classifier_weights(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="the graph and PyTorch disagree: logits differ by"):
        run_export(str(weights), tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_bad_requests(tmp_path):
    torch.save(create_model("cspresnet10", 1000).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not say which network it is of: give --model"):
        run_export(str(tmp_path / "w.pth"), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="an artefact's name ends in .onnx"):
        run_export(str(tmp_path / "w.pth"), tmp_path / "m.pt")
    with pytest.raises(InputError, match="no weights at"):
        run_export(str(tmp_path / "none.pth"), tmp_path / "m.onnx", model="cspresnet10")
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="has 1 images: give a folder with at least 4"):
        run_export(str(classifier_weights(tmp_path / "c.safetensors")), tmp_path / "m.onnx", images=str(tmp_path))


def test_foreign_newer_and_broken_files_are_refused(classifier, tmp_path):
    path = tmp_path / "m.onnx"

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match) as error:
            OnnxModel(path)
        assert "\n" not in str(error.value)

    refused("no artefact at")
    path.write_bytes(classifier.read_bytes()[:1000])
    refused("no ONNX file that onnxruntime loads")
    graph = onnx.load(classifier)
    text = graph.metadata_props[0].value
    for value, match in (
        (None, "carries no cspnet metadata"),
        ("{", "broken metadata"),
        (text.replace('"schema_version":1', '"schema_version":2'), "metadata version 2, not 1: update cspnet"),
        (text.replace('"classification"', '"song"'), "broken metadata"),
    ):
        onnx.helper.set_model_props(graph, {} if value is None else {"cspnet": value})
        onnx.save(graph, path)
        refused(match)


def test_metadata_comes_back(classifier):
    about = OnnxModel(classifier).metadata
    assert from_metadata(to_metadata(about), "here") == about
    assert about.schema_version == SCHEMA_VERSION


def test_cuda_that_is_not_there_is_an_error(classifier):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match="asked for CUDAExecutionProvider but onnxruntime gives CPUExecutionProvider"):
        OnnxModel(classifier, provider="cuda")
    assert OnnxModel(classifier, provider="auto").provider == "CPUExecutionProvider"
