from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from test_backbones_cspnet import randomize

import serving.parity
from backbones.cspnet import create_model
from backbones.errors import InputError
from backbones.preprocess import ClassifierPreprocess, DetectorPreprocess
from backbones.weights import save_weights
from detection.models import DetectorSpec, build_detector
from serving.__main__ import main
from serving.artifact import SCHEMA_VERSION, from_metadata, to_metadata
from serving.export import run_export
from serving.runtime import OnnxModel

CROP = ClassifierPreprocess(resize=40, crop=32)
SIZE = DetectorPreprocess(min_size=96, max_size=128)


def classifier_weights(path: Path, name: str = "cspresnet10") -> Path:
    model = randomize(create_model(name, 3))
    classes = {"classes": ["circle", "cross", "square"], "preprocess": CROP.model_dump(), "config": {"seed": 7}}
    save_weights(path, model, {"task": "classification", "model": name, **classes})
    return path


def detector_weights(path: Path, family: str = "fcos") -> Path:
    """Random weights, with heads that find objects everywhere."""
    spec = DetectorSpec(
        model=f"{family}_cspresnet10_fpn", num_classes=3, fpn_channels=64, score_threshold=0.2, max_detections=30
    )
    model = randomize(build_detector(spec, SIZE))
    for name, parameter in model.named_parameters():
        if "cls_score" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "classification_head.cls_logits" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        if "classification_head.cls_logits.bias" in name:  # of (anchor, class): training makes background rare
            parameter.data.view(-1, spec.num_classes)[:, 0] = -10
    metadata = {"task": "detection", "model": spec.model, "detector": spec.model_dump(), "classes": ["cat", "dog"]}
    metadata |= {"category_ids": [5, 90], "preprocess": SIZE.model_dump(), "config": {}}
    save_weights(path, model, metadata)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    run_export(str(classifier_weights(root / "w.safetensors")), root / "m.onnx")
    return root / "m.onnx"


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


@pytest.mark.parametrize("family", ["fcos", "retinanet", "fasterrcnn"])
def test_detector_of_every_family(tmp_path, family, capsys):
    weights = detector_weights(tmp_path / "w.safetensors", family)
    main(["export", "--weights", str(weights), "-o", str(tmp_path / "m.onnx")])
    assert "largest difference from PyTorch" in capsys.readouterr().out
    model = OnnxModel(tmp_path / "m.onnx")
    about = model.metadata
    assert (about.classes, about.category_ids) == (("cat", "dog"), (5, 90))
    assert (about.score_threshold, about.max_detections) == (0.2, 30)
    assert about.parity.detections > 10
    assert about.parity.largest["boxes"] < 0.05
    assert model.outputs["boxes"][1] == ["N", 30, 4]


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    weights = classifier_weights(tmp_path / "w.safetensors")
    monkeypatch.setattr(serving.parity, "TOLERANCE", dict.fromkeys(serving.parity.TOLERANCE, -1.0))
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
