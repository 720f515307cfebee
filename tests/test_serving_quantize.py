"""INT8 with proof: what is chosen, what is refused, and that the file written is as accurate as it says."""

import contextlib
import io
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from artifacts import write_classifier
from mask_artifacts import write_raw
from onnx import TensorProto, helper, numpy_helper

import serving.quantize
from backbones.errors import InputError
from backbones.files import write_json
from serving.__main__ import main
from serving.artifact import read_artifact, read_whole, write_artifact
from serving.evaluate import ArtifactSource, run_eval
from serving.graph.calibrate import METHODS, measure_ranges
from serving.graph.qdq import HEADS, activations, chains, exclusions, products, quantize
from serving.quantize import Candidate, calibration_images, choose, problem, run_quantize, speedup
from serving.runtime import OnnxModel
from serving.selftest import check
from serving.shapes import background, draw_detection

CONFIGS = Path(__file__).parents[1] / "configs" / "quickstart"
CLASSES = ("circle", "cross", "square")  # of `exported("classifier")`


def candidate(accuracy: float, *speed: float, kept: str = "nothing") -> Candidate:
    return Candidate("minmax", kept, 0, accuracy, speed)


# What is chosen of measured candidates, and what is not written.


def test_the_most_accurate_of_the_nearly_fastest_is_chosen():
    fast, nearly, slow = candidate(0.80, 3.0, 2.0), candidate(0.81, 1.9, 4.0), candidate(0.82, 1.7, 9.0)
    assert choose([fast, nearly, slow], 0.81, max_drop=0.5) is nearly  # a candidate's speed is its lower one
    assert choose([fast, candidate(0.80, 2.0, 2.0)], 0.8, max_drop=0.5) is fast  # the first of equals


def test_accuracy_goes_before_speed_if_the_fast_ones_lose_too_much():
    fast, slow, slower_than_float = candidate(0.70, 3, 3), candidate(0.795, 1.2, 1.5), candidate(0.80, 0.9, 2)
    assert choose([fast, slow, slower_than_float], 0.8, max_drop=0.5) is slow
    assert choose([fast, slow, slower_than_float], 0.8, max_drop=10) is fast
    assert choose([candidate(0.5, 0.8, 0.8), slower_than_float], 0.8, max_drop=0.5) is slower_than_float


def test_what_is_not_worth_writing():
    assert problem(candidate(0.795, 1.1, 2), "top1", 0.8, max_drop=0.5) == ""  # exactly what it may lose
    assert problem(candidate(0.9, 1.1, 2), "top1", 0.8, max_drop=0) == ""
    lost = problem(candidate(0.79, 1.1, 2), "top1", 0.8, max_drop=0.5)
    assert lost.startswith("loses 1.00 points, over --max-drop 0.5 (top1 0.8000 to 0.7900; 1.10 and 2.00 times")
    assert "is not faster" in problem(candidate(0.8, 2.0, 1.0), "top1", 0.8, max_drop=0.5)


def test_speed_is_a_ratio_of_times_of_the_same_sample():
    def model(seconds: float) -> SimpleNamespace:
        return SimpleNamespace(run=lambda images: time.sleep(seconds * len(images)))

    samples = [{"images": np.zeros((size, 1))} for size in (1, 2)]
    assert all(ratio > 2 for ratio in speedup(model(0.01), model(0.001), samples))
    assert all(ratio < 0.5 for ratio in speedup(model(0.001), model(0.01), samples))


# Ranges of activations.


def relu(inputs: list[np.ndarray], methods=METHODS) -> dict:
    def value(name: str):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"])

    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "relu", [value("x")], [value("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return measure_ranges(model, ["x", "y"], ({"x": x} for x in inputs), methods)


def test_ranges_of_a_normal_distribution_with_outliers():
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal(170_000).astype(np.float32) for _ in range(4)]
    for i, batch in enumerate(batches):
        batch[1 + i], batch[0] = 20 + i, -30  # the first is in the sample, so all methods see it
    ranges = relu(batches)
    assert ranges["minmax"] == {"x": (-30, 23), "y": (0, 23)}
    low, high = ranges["percentile"]["x"]
    assert (low, high) == pytest.approx((-3.89, 3.89), abs=0.3)  # 99.99% of a normal distribution
    for method in ("percentile", "entropy"):
        assert ranges[method]["y"][0] == 0
        for name in "xy":
            assert 2 < ranges[method][name][1] < 6


def test_zero_is_in_every_range_and_tensors_may_be_empty():
    above = relu([np.full(100, 5.0, np.float32), np.zeros(0, np.float32)])
    for method in METHODS:
        low, high = above[method]["x"]
        assert low == 0 < high <= 5.1
    assert relu([np.full(3, -2.0, np.float32)], ("minmax",)) == {"minmax": {"x": (-2, 0), "y": (0, 0)}}


# The graph.


@pytest.fixture(scope="module")
def graph(exported) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(read_whole(exported("classifier")).graph)


@pytest.fixture(scope="module")
def ranges(graph) -> dict:
    rng = np.random.default_rng(0)
    batches = [{"images": rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)} for _ in range(4)]
    return measure_ranges(graph, activations(graph.graph), batches, ("minmax",))["minmax"]


def int8_weights(graph: onnx.ModelProto) -> list[np.ndarray]:
    found = [numpy_helper.to_array(tensor) for tensor in graph.graph.initializer]
    return [array for array in found if array.dtype == np.int8 and array.ndim > 1]


def test_products_become_int8_and_only_standard_operators_are_used(graph, ranges):
    quantized = quantize(graph, ranges, set())
    onnx.checker.check_model(quantized, full_check=True)
    assert {(entry.domain, entry.version) for entry in quantized.opset_import} == {("", 18)}
    assert {node.domain for node in quantized.graph.node} == {""}
    weights = int8_weights(quantized)
    assert len(weights) == len(products(graph.graph)) > 20
    assert max(int(np.abs(array).max()) for array in weights) <= 64  # 7 bits: nothing overflows without VNNI


def test_what_is_kept_stays_as_it_was(graph, ranges):
    choices = exclusions(graph.graph)
    assert list(choices) == ["nothing", "first and last"]
    assert choices["nothing"] == set()
    every = products(graph.graph)
    assert choices["first and last"] == {every[0].name, every[-1].name}
    quantized = quantize(graph, ranges, choices["first and last"])
    kept = {node.name: node for node in quantized.graph.node if node.name in choices["first and last"]}
    constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
    for node in (every[0], every[-1]):
        before = next(tensor for tensor in graph.graph.initializer if tensor.name == node.input[1])
        after = constants[kept[node.name].input[1]]
        np.testing.assert_array_equal(numpy_helper.to_array(after), numpy_helper.to_array(before))
    assert len(int8_weights(quantized)) == len(every) - 2


@pytest.mark.slow
def test_heads_can_be_kept_and_the_decoding_of_boxes_always_is(exported):
    graph = onnx.shape_inference.infer_shapes(read_whole(exported("fcos")).graph).graph
    choices = exclusions(graph)
    assert list(choices) == ["nothing", "first and last", "first, last and heads"]
    inside = [node.op_type for node in chains(graph, set())]
    heads = {node.name for node in products(graph) if node.input[1].startswith(HEADS)}
    assert heads <= choices["first, last and heads"]
    assert len(heads) > 10
    assert sum(node.op_type == "Add" for node in graph.node) > inside.count("Add") > 0


def test_convolutions_in_groups_can_be_kept_but_not_those_of_one_channel_a_group():
    rng = np.random.default_rng(0)
    nodes, weights, tensor = [], [], "x"
    for name, groups in (("first", 1), ("grouped", 2), ("depthwise", 8), ("last", 1)):
        weights.append(numpy_helper.from_array(rng.random((8, 8 // groups, 1, 1), np.float32), f"w_{name}"))
        nodes.append(helper.make_node("Conv", [tensor, f"w_{name}"], [name], name, group=groups))
        tensor = name
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 4, 4]) for name in ("x", tensor)]
    assert exclusions(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)) == {
        "nothing": set(),
        "grouped": {"grouped"},
        "first and last": {"first", "last"},
        "grouped, first and last": {"first", "grouped", "last"},
    }


# The command.


@pytest.fixture(scope="module")
def data(exported, tmp_path_factory) -> tuple[Path, str, list[str]]:
    """Images sorted by what the float artefact says of them, so that its accuracy is 1: the artefact, its config and
    overrides.
    """
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for folder in [root / split / name for split in ("train", "val") for name in CLASSES]:
        folder.mkdir(parents=True)
    paths = [root / f"{i}.png" for i in range(60)]
    for path in paths:
        background(rng, 48, 48).save(path)
    for path, row in zip(paths, ArtifactSource(exported("classifier"), "cpu").rows(paths), strict=True):
        path.rename(root / "val" / CLASSES[row.result.indices[0]] / path.name)
    for i in range(9):
        background(rng, 48, 48).save(root / "train" / CLASSES[i % 3] / f"{i}.png")
    assert all(any(folder.iterdir()) for folder in (root / "val").iterdir())
    overrides = [f"data.root={root}", "num_classes=3", "preprocess.resize=40", "preprocess.crop=32"]
    return exported("classifier"), str(CONFIGS / "classifier.yaml"), overrides


@pytest.fixture
def fast(monkeypatch):
    """INT8 is twice as fast, whatever this machine does."""
    monkeypatch.setattr(serving.quantize, "speedup", lambda *_: (2.0, 2.5))


@pytest.fixture(scope="module")
def written(data, tmp_path_factory) -> tuple[Path, str]:
    """What the command writes, and prints."""
    model, config, overrides = data
    output = tmp_path_factory.mktemp("int8") / "m.int8.onnx"
    arguments = ["quantize", str(model), "-o", str(output), "--config", config, "--images", "6", "--max-drop", "20"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(serving.quantize, "speedup", lambda *_: (2.0, 2.5))
        main([*arguments, *overrides])
    assert list(output.parent.iterdir()) == [output]
    return output, said.getvalue()


def test_artefact_is_as_accurate_as_it_says(data, written, tmp_path):
    model, config, overrides = data
    (made, _), (original, _) = read_artifact(written[0]), read_artifact(model)
    about = made.quantization
    assert about is not None
    assert (made.precision, about.images, about.metric, about.speedup) == ("int8", 6, "top1", {1: 2.0, 8: 2.5})
    assert about.before == 1
    result, _ = run_eval(config, [*overrides, f"output={tmp_path}"], ArtifactSource(written[0], "cpu"))
    assert result["top1"] == about.after > 0.8
    check(OnnxModel(written[0], "cpu"))
    changed = {"precision", "quantization", "parity", "self_test"}
    assert made.model_dump(exclude=changed) == original.model_dump(exclude=changed)
    assert written[0].stat().st_size < 0.4 * model.stat().st_size


def test_table_shows_what_was_tried(written):
    lines = [line.split() for line in written[1].splitlines()]
    tried = [line[:2] for line in lines if line[0] in METHODS]
    assert tried[:3] == [[method, "nothing"] for method in METHODS]
    assert tried[3][1:] == ["first"]
    assert lines[1][:4] == ["method", "kept", "in", "float"]
    assert lines[2] == ["float", "1.0000"]
    assert "2.00 times as fast" in written[1].splitlines()[-1]


def test_the_same_choice_gives_the_same_bytes(data, written, fast, tmp_path):
    model, config, overrides = data
    about = read_artifact(written[0])[0].quantization
    run_quantize(model, tmp_path / "m.onnx", config, overrides, images=6, max_drop=20, method=about.method)
    assert (tmp_path / "m.onnx").read_bytes() == written[0].read_bytes()


def test_a_model_that_lost_too_much_is_written_by_force_alone(data, fast, tmp_path, monkeypatch):
    """With ranges in which nothing fits: all images get the same class."""
    model, config, overrides = data

    def measure(_, names, *__):
        return {"minmax": dict.fromkeys(names, (0.0, 1e-6))}

    monkeypatch.setattr(serving.quantize, "measure_ranges", measure)
    arguments = {"images": 3, "method": "minmax"}
    with pytest.raises(InputError, match=r"loses \d+\.\d\d points, over --max-drop 0.5 \(top1 1.0000 to 0.*--force"):
        run_quantize(model, tmp_path / "m.onnx", config, overrides, **arguments)
    assert list(tmp_path.iterdir()) == []
    made = run_quantize(model, tmp_path / "m.onnx", config, overrides, **arguments, force=True)
    assert (made.quantization.method, made.quantization.forced) == ("minmax", True)
    assert made.quantization.after < 0.9
    assert read_artifact(tmp_path / "m.onnx")[0] == made


def test_a_model_that_is_not_faster_is_not_written(data, tmp_path, monkeypatch):
    model, config, overrides = data
    monkeypatch.setattr(serving.quantize, "speedup", lambda *_: (1.5, 0.9))
    with pytest.raises(InputError, match="is not faster on this machine .* 1.50 and 0.90 times as fast at batch 1 and"):
        run_quantize(model, tmp_path / "m.onnx", config, overrides, images=3, max_drop=100, method="minmax")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_detector_of_which_ap_is_measured(exported, fast, tmp_path):
    """Every third detection of the float artefact is the truth. What is written finds nearly as much of it."""
    model = exported("fcos")
    draw_detection(tmp_path, {"train": 4, "val": 6}, seed=1, size=160)
    images = json.loads((tmp_path / "val.json").read_text())["images"]
    categories = [{"id": 5, "name": "cat"}, {"id": 90, "name": "dog"}]
    overrides = [
        *(f"data.{name}={tmp_path / split}" for name, split in (("images", "val"), ("train_images", "train"))),
        f"data.annotations={tmp_path / 'truth.json'}", f"data.train_annotations={tmp_path / 'train.json'}",
        "preprocess.min_size=96", "preprocess.max_size=128", "score_threshold=0.2", "max_detections=30",
    ]  # fmt: skip
    config, found = str(CONFIGS / "detector.yaml"), tmp_path / "detections-artifact.json"
    write_json(tmp_path / "truth.json", {"images": images, "categories": categories, "annotations": []})
    run_eval(config, [*overrides, f"output={tmp_path}"], ArtifactSource(model, "cpu"))
    truth = json.loads(found.read_text())[::3]
    write_json(tmp_path / "truth.json", {"images": images, "categories": categories, "annotations": truth})
    made = run_quantize(model, tmp_path / "m.onnx", config, overrides, images=4, method="minmax", max_drop=60)
    about = made.quantization
    assert (about.metric, about.images) == ("AP50", 4)
    assert 0 < about.before < 1
    result, _ = run_eval(config, [*overrides, f"output={tmp_path}"], ArtifactSource(tmp_path / "m.onnx", "cpu"))
    assert result["AP50"] == about.after > 0


# Refusals.


def test_only_float_artefacts_are_taken(data, written, tmp_path):
    model, config, overrides = data
    with pytest.raises(InputError, match="is int8 already: quantize the fp32 artefact that `export` writes"):
        run_quantize(written[0], tmp_path / "m.onnx", config, overrides)
    _, graph, artifact, _ = read_whole(model)
    half = tmp_path / "half.onnx"
    write_artifact(graph, artifact.model_copy(update={"precision": "fp16"}), half)
    with pytest.raises(InputError, match="is fp16 already"):
        run_quantize(half, tmp_path / "m.onnx", config, overrides)
    with pytest.raises(InputError, match="has raw heads, whose accuracy cannot be measured: export without --no-nms"):
        run_quantize(write_raw(tmp_path / "raw.onnx"), tmp_path / "m.onnx", config, overrides)
    with pytest.raises(InputError, match="-o .*m.pt: an artefact's name ends in .onnx"):
        run_quantize(model, tmp_path / "m.pt", config, overrides)


def test_a_graph_without_products_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="has no convolution or matrix product with constant weights"):
        run_quantize(write_classifier(tmp_path / "c.onnx"), tmp_path / "m.onnx", *data[1:])


def test_calibration_images(data, tmp_path):
    model, config, overrides = data
    artifact, _ = read_artifact(model)
    train = Path(overrides[0].removeprefix("data.root=")) / "train"
    chosen, where = calibration_images(config, overrides, artifact, None, 3)
    assert where.endswith("split train")
    assert [path.name for path in chosen] == ["0.png", "1.png", "2.png"]  # evenly spread: one of each class
    with pytest.raises(InputError, match="has 9 images: give --images from 1 to that many, not 10"):
        calibration_images(config, overrides, artifact, None, 10)
    with pytest.raises(InputError, match="has no images to choose ranges on"):
        calibration_images(config, overrides, artifact, str(tmp_path), 1)
    shutil.copytree(train, tmp_path / "own")
    assert calibration_images(config, overrides, artifact, str(tmp_path / "own"), 9)[1] == str(tmp_path / "own")


def test_images_that_accuracy_is_measured_on_are_refused(data, tmp_path):
    model, config, overrides = data
    artifact, _ = read_artifact(model)
    val = Path(overrides[0].removeprefix("data.root=")) / "val"
    (tmp_path / "link").symlink_to(val)
    for folder in (val, tmp_path / "link"):
        with pytest.raises(InputError, match=r"has images that accuracy is measured on, such as .*png: give others as"):
            calibration_images(config, overrides, artifact, str(folder), 2)
    with pytest.raises(InputError, match="split val has images that accuracy is measured on"):
        calibration_images(config, [*overrides, "data.train_split=val"], artifact, None, 2)
