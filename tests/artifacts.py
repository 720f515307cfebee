"""Tiny artefacts made with onnx alone, so that the tests of serving need no torch.

Shapes: N images, H, W pixels, C classes, K boxes.
"""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from backbones.preprocess import ClassifierPreprocess, DetectorPreprocess, canvases
from serving.artifact import Artifact, ClassifierArtifact, DetectorArtifact, Parity, read_whole, write_artifact
from serving.predictor import create_predictor
from serving.runtime import OnnxModel
from serving.selftest import record

COLOURS = ("red", "green", "blue")
RGB = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "white": (255, 255, 255)}
BOXES = ((0.25, 0.25, 0.75, 0.75), (0.0, 0.0, 0.5, 1.0))  # of the image's width and height
SCORES = (0.9, 0.6)
LABELS = (2, 1)
SIZE = DetectorPreprocess(min_size=64, max_size=128)
OPSET = 18
_COMMON: dict[str, Any] = {
    "opset": OPSET,
    "gmacs": 0.0,
    "weights_sha256": "0" * 64,
    "config": {},
    "versions": {},
    "parity": Parity(batch_sizes=(1, 2), images=3, largest={}),
}


def picture(colour: str, size: tuple[int, int] = (60, 40), kind: str = "PNG") -> bytes:
    """An encoded picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, RGB[colour]).save(buffer, kind)
    return buffer.getvalue()


def write_classifier(
    path: Path, work: int = 0, crop: int = 32, name: str = "colours", hangs: bool = False, batch: int | str = "N"
) -> Path:
    """Answers an image's main colour: probabilities are the softmax of the mean of R, G and B, over 16.

    Args:
        work: multiplications of two 768 x 768 matrices to do for each batch, to be as slow as a real model.
        name: what it says that it is.
        hangs: on a white image it does not end.
        batch: the one size that it takes.
    """
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),  # [N, H, W, 3]
        helper.make_node("ReduceMean", ["pixels", "hw"], ["means"], keepdims=0),  # [N, 3]
        helper.make_node("Div", ["means", "sixteen"], ["scaled"]),
        *(_endless_on_white() if hangs else []),
        *_busy(work or hangs),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    constants = {
        "hw": np.array([1, 2], dtype=np.int64),
        "sixteen": np.array(16, dtype=np.float32),
        **({"almost_white": np.float32([254.5]), "endless": np.array(2**62)} if hangs else {"trips": np.array(work)}),
        "start": np.zeros((768, 768), dtype=np.float32),
        "zero": np.array(0, dtype=np.float32),
        "true": np.array(True),
    }
    outputs = [_value("logits", TensorProto.FLOAT, ["N", 3]), _value("probabilities", TensorProto.FLOAT, ["N", 3])]
    metadata = ClassifierArtifact(
        model=name, classes=COLOURS, preprocess=ClassifierPreprocess(resize=crop, crop=crop), **_COMMON
    )
    return _write(path, nodes, constants, [_images(batch)], outputs, metadata)


def write_slow_classifier(path: Path, seconds: float) -> Path:
    """One that takes about so long for an image, on whatever machine this is."""
    trial = 20
    predictor = create_predictor(OnnxModel(write_classifier(path, work=trial), "cpu"))
    prepared: Any = [predictor.prepare(picture("red"))]
    took = []
    for _ in range(5):
        began = time.perf_counter()
        predictor.predict(prepared)
        took.append(time.perf_counter() - began)
    return write_classifier(path, work=int(seconds * trial / min(took)))  # the least: others may run beside one


def write_detector(path: Path, score_threshold: float = 0.5) -> Path:
    """Answers `BOXES` with `SCORES` and `LABELS` (the background is 0) for each image."""
    k = len(BOXES)
    nodes = [
        helper.make_node("Cast", ["sizes"], ["hw"], to=TensorProto.FLOAT),  # [N, 2]
        helper.make_node("Gather", ["hw", "whwh"], ["scale"], axis=1),  # [N, 4]
        helper.make_node("Unsqueeze", ["scale", "one"], ["scales"]),  # [N, 1, 4]
        helper.make_node("Mul", ["scales", "relative"], ["boxes"]),  # [N, K, 4]
        helper.make_node("Shape", ["images"], ["n"], start=0, end=1),  # [1]
        helper.make_node("Concat", ["n", "k"], ["nk"], axis=0),
        helper.make_node("Expand", ["fixed_scores", "nk"], ["scores"]),  # [N, K]
        helper.make_node("Expand", ["fixed_labels", "nk"], ["labels"]),  # [N, K]
        helper.make_node("Expand", ["k", "n"], ["num_detections"]),  # [N]
    ]
    constants = {
        "whwh": np.array([1, 0, 1, 0], dtype=np.int64),
        "one": np.array([1], dtype=np.int64),
        "relative": np.array([BOXES], dtype=np.float32),
        "k": np.array([k], dtype=np.int64),
        "fixed_scores": np.array([SCORES], dtype=np.float32),
        "fixed_labels": np.array([LABELS], dtype=np.int64),
    }
    inputs = [_images(), _value("sizes", TensorProto.INT64, ["N", 2])]
    outputs = [
        _value("boxes", TensorProto.FLOAT, ["N", k, 4]),
        _value("scores", TensorProto.FLOAT, ["N", k]),
        _value("labels", TensorProto.INT64, ["N", k]),
        _value("num_detections", TensorProto.INT64, ["N"]),
    ]
    metadata = DetectorArtifact(
        model="boxes",
        classes=("cat", "dog"),
        category_ids=(17, 18),
        preprocess=SIZE,
        canvases=canvases(SIZE),
        score_threshold=score_threshold,
        nms_iou=0.5,
        max_detections=k,
        **_COMMON,
    )
    return _write(path, nodes, constants, inputs, outputs, metadata)


def keep_answer(path: Path) -> Path:
    """Let an artefact keep its answer to a known image, as those that are exported do."""
    _, graph, artifact, _ = read_whole(path)
    kept = record(OnnxModel(path, "cpu", cache=False))
    write_artifact(graph, artifact.model_copy(update={"self_test": kept}), path)
    return path


def _endless_on_white() -> list[onnx.NodeProto]:
    """How often `_busy` is to multiply."""
    return [
        helper.make_node("ReduceMin", ["means"], ["darkest"], keepdims=0),
        helper.make_node("Greater", ["darkest", "almost_white"], ["white"]),
        helper.make_node("Cast", ["white"], ["any"], to=TensorProto.INT64),
        helper.make_node("Mul", ["any", "endless"], ["many"]),
        helper.make_node("Squeeze", ["many"], ["trips"]),
    ]


def _busy(work: int) -> list[onnx.NodeProto]:
    """`scaled` to `logits`, unchanged; a loop keeps the graph small and is not folded away."""
    if not work:
        return [helper.make_node("Identity", ["scaled"], ["logits"])]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("MatMul", ["a", "a"], ["b"])],
        "multiply",
        [_value("i", TensorProto.INT64, []), _value("go", TensorProto.BOOL, []), _value("a", TensorProto.FLOAT, None)],
        [_value("on", TensorProto.BOOL, []), _value("b", TensorProto.FLOAT, None)],
    )
    return [
        helper.make_node("Loop", ["trips", "true", "start"], ["zeros"], body=body),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["scaled", "nothing"], ["logits"]),
    ]


def _images(batch: int | str = "N") -> onnx.ValueInfoProto:
    return _value("images", TensorProto.UINT8, [batch, "H", "W", 3])


def _value(name: str, kind: int, shape: list[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _write(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    metadata: Artifact,
) -> Path:
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_artifact(model, metadata, path)
    return path
