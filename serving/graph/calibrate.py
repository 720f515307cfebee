"""The ranges of a graph's activations on real images, by three methods in one pass; no torch here.

The graph itself reduces each tensor to its least and largest value and every `STRIDE`-th of the rest, so that one
batch's activations are all that is ever in memory, and no more than a run of the graph needs.
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnxruntime.quantization.calibrate import HistogramCollector

from serving.sessions.ort import session_options
from serving.sessions.providers import usable_cores

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
Ranges = dict[str, tuple[float, float]]  # of each tensor: what its least and largest quantized value stand for

STRIDE = 17  # prime, so that it samples all channels and columns
PERCENTILE = 99.99  # of a tensor's values that lie inside its range
BINS = 512  # of a histogram, which grows with the range; entropy's cost goes with their square
LEVELS = 128  # that entropy compares a histogram with, as in NVIDIA's calibration (S. Migacz, GTC 2017)


def measure_ranges(
    graph: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Mapping[str, npt.NDArray[Any]]],
    methods: Sequence[Method] = METHODS,
) -> dict[Method, Ranges]:
    """The range of each of a graph's float tensors over batches of its inputs, as each method has it.

    Min-max takes all values in, percentile cuts off the outermost, and entropy cuts where the quantized distribution
    is nearest to the whole one. The last two see a sample. Zero is in every range.
    """
    tapped, options = _tapped(graph, tensors).SerializeToString(), session_options(usable_cores())
    session = ort.InferenceSession(tapped, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()][len(graph.graph.output) :]
    ends, sampled = np.zeros((len(tensors), 2), dtype=np.float32), set(methods) != {"minmax"}
    collector = HistogramCollector(
        "percentile", symmetric=False, num_bins=BINS, num_quantized_bins=LEVELS, percentile=PERCENTILE, scenario="same"
    )
    for batch in batches:
        values = session.run(names, dict(batch))
        ends[:, 0] = np.minimum(ends[:, 0], values[0::3])
        ends[:, 1] = np.maximum(ends[:, 1], values[1::3])
        if sampled:
            collector.collect_value(dict(zip(tensors, values[2::3], strict=True)))
    with contextlib.redirect_stdout(io.StringIO()):  # the collector reports its progress there
        return {method: _ranges(method, tensors, ends, collector) for method in methods}


def _ranges(method: Method, tensors: Sequence[str], ends: npt.NDArray[np.float32], cut: HistogramCollector) -> Ranges:
    if method == "minmax":
        return {name: (float(low), float(high)) for name, (low, high) in zip(tensors, ends, strict=True)}
    found = cut.compute_percentile() if method == "percentile" else cut.compute_entropy()
    return {name: (min(0.0, float(low)), max(0.0, float(high))) for name, (low, high, *_) in found.items()}


def _tapped(graph: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The graph with three more outputs a tensor: its least value, its largest, and a sample with a zero in front.

    That zero, which has to be in the range anyway, keeps a tensor without values from being an error.
    """
    tapped = onnx.ModelProto()
    tapped.CopyFrom(graph)
    constants = {"zero": np.zeros(1, np.float32), "flat": np.array([-1]), "from": np.array([0])}
    constants |= {"to": np.array([np.iinfo(np.int64).max]), "step": np.array([STRIDE])}
    tapped.graph.initializer.extend(numpy_helper.from_array(value, f"tap.{key}") for key, value in constants.items())
    for i, tensor in enumerate(tensors):
        flat, with_zero, low, high, sample = (f"tap.{i}.{part}" for part in ("flat", "zero", "low", "high", "sample"))
        tapped.graph.node.extend(
            [
                helper.make_node("Reshape", [tensor, "tap.flat"], [flat]),
                helper.make_node("Concat", ["tap.zero", flat], [with_zero], axis=0),
                helper.make_node("ReduceMin", [with_zero], [low], keepdims=0),
                helper.make_node("ReduceMax", [with_zero], [high], keepdims=0),
                helper.make_node("Slice", [with_zero, "tap.from", "tap.to", "tap.from", "tap.step"], [sample]),
            ]
        )
        shapes: tuple[tuple[str, list[Any]], ...] = ((low, []), (high, []), (sample, [None]))
        tapped.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes)
    return tapped
