import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import CROP, FAMILIES, classifier_weights
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import serving.export
from backbones.cspnet import create_model
from backbones.errors import InputError
from serving.export import OPSET, run_export, without_paths
from serving.graph.half import to_half
from serving.runtime import OnnxModel

# In one export, as each takes a minute.
HALF = ("--precision", "fp16", "--score-threshold", "0.25", "--nms-iou", "0.4", "--max-detections", "20")


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
    assert about.parity.batch_sizes == (1, 3, 8)
    assert (about.precision, about.opset) == ("fp32", OPSET)
    assert about.opset == onnx.load(classifier).opset_import[0].version
    assert 0 < about.gmacs < 0.1
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
    np.testing.assert_array_equal(alone, outputs["logits"])


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
    assert about.parity.largest["boxes"] < 1e-2
    assert model.outputs["boxes"][1] == ["N", 30, 4]


def test_a_graph_that_differs_is_not_written(classifier, tmp_path, monkeypatch):
    """As if tracing had gone wrong: the graph is another network's."""
    monkeypatch.setattr(serving.export, "trace", lambda *_: onnx.load(classifier))
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
    weights = str(classifier_weights(tmp_path / "c.safetensors"))
    with pytest.raises(InputError, match="holds a classifier, which has no nms_iou, no_nms: leave it out"):
        run_export(weights, tmp_path / "m.onnx", nms=False, nms_iou=0.4)
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="has 1 images: give a folder with at least 4"):
        run_export(weights, tmp_path / "m.onnx", images=str(tmp_path))


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes(classifier, tmp_path):
    """In another process, whose sets have another order, and under another name."""
    again = tmp_path / "other.onnx"
    command = [sys.executable, "-m", "serving", "export", "--weights", str(classifier.parent / "w.safetensors")]
    environment = os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([*command, "-o", str(again)], check=True, capture_output=True, env=environment)
    assert again.read_bytes() == classifier.read_bytes()


def test_nodes_are_named_after_the_modules_they_come_from(classifier):
    names = [node.name for node in onnx.load(classifier).graph.node]
    assert len(set(names)) == len(names)
    convolutions = [node.name for node in onnx.load(classifier).graph.node if node.op_type == "Conv"]
    assert convolutions[0].startswith("model/stem/")
    assert all(name.startswith(("model/stem/", "model/stages/")) for name in convolutions)


def test_half_precision_halves_the_file_and_agrees(exported, classifier):
    path = exported("classifier", "--precision", "fp16")
    assert path.stat().st_size < 0.55 * classifier.stat().st_size
    about = OnnxModel(path, "cpu").metadata
    assert about.precision == "fp16"
    assert 1e-4 < about.parity.largest["logits"] < 2e-2
    assert about.parity.agreement == 1
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert products and all(types[node.input[1]] == TensorProto.FLOAT16 for node in products)
    assert [value.type.tensor_type.elem_type for value in graph.output] == [TensorProto.FLOAT] * 2


@pytest.mark.slow
def test_half_precision_leaves_the_choice_of_boxes_in_float(exported):
    path = exported("fcos", *HALF)
    about = OnnxModel(path, "cpu").metadata
    assert about.parity.detections > 10
    assert about.parity.largest["boxes"] < 4
    assert about.parity.unmatched < 0.1 * about.parity.detections
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    half = {node.op_type for node in graph.node if TensorProto.FLOAT16 in map(types.get, node.output)}
    assert "Conv" in half
    assert not half & {"Exp", "NonMaxSuppression", "TopK", "Where", "Div", "Sigmoid", "GatherElements"}
    assert all(types[node.input[1]] == TensorProto.FLOAT16 for node in graph.node if node.op_type == "Conv")


def test_what_stays_in_float_is_not_rounded():
    """y = x / 3 + x in float, z = y / 3 in a network: as onnxruntime's own converter does not, y is exact."""
    third = numpy_helper.from_array(np.float32(1 / 3), "third")
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xyz")
    nodes = [
        helper.make_node("Mul", ["x", "third"], ["part"], name="decode/mul"),
        helper.make_node("Add", ["part", "x"], ["y"], name="decode/add"),
        helper.make_node("Mul", ["y", "third"], ["z"], name="network/mul"),
    ]
    graph = helper.make_graph(nodes, "boxes", [x], [y, z], [third])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    to_half(model, {"network/mul"})
    onnx.checker.check_model(model, full_check=True)
    assert {tensor.name for tensor in model.graph.initializer} == {"third", "third/half"}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = np.float32([0.123, 123.4, 1234.567])
    exact, rounded = session.run(None, {"x": given})
    assert exact.dtype == rounded.dtype == np.float32
    np.testing.assert_allclose(exact, given / 3 + given, rtol=1e-6)
    np.testing.assert_allclose(rounded, exact / 3, rtol=2e-3)
    assert (np.abs(rounded - exact / 3) > 1e-6 * exact).all()


@pytest.mark.slow
def test_detectors_settings_come_from_the_flags(exported):
    about = OnnxModel(exported("fcos", *HALF), "cpu")
    assert (about.metadata.score_threshold, about.metadata.nms_iou, about.metadata.max_detections) == (0.25, 0.4, 20)
    assert about.outputs["boxes"][1] == ["N", 20, 4]


@pytest.mark.slow
def test_raw_heads(exported):
    model = OnnxModel(exported("fcos", "--no-nms"), "cpu")
    assert not model.metadata.nms
    assert list(model.outputs) == ["boxes", "scores"]


@pytest.mark.slow
def test_masks_are_an_output(exported):
    model = OnnxModel(exported("maskrcnn"), "cpu")
    assert model.metadata.masks
    assert model.outputs["masks"][1] == ["N", 30, 28, 28]


def test_a_config_keeps_no_path_of_whoever_trained():
    config = {
        "output": "/home/me/runs",
        "data": {"root": "~/data", "batch_size": 8, "split": "val"},
        "weights": "C:\\w.pt",
        "from": ["https://user:token@host/w.pt", "/home/me", "timm"],
    }
    assert without_paths(config) == {"data": {"batch_size": 8, "split": "val"}, "from": ["timm"]}
