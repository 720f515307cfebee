"""A float graph with quantize-dequantize pairs round what onnxruntime then runs in INT8; no torch here.

Activations are uint8, weights int8 per output channel. Weights use 7 of their 8 bits: without VNNI, an x86 processor
adds two products in 16 bits, where 8-bit weights overflow unseen. So one file gives one answer everywhere.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from serving.graph.calibrate import Ranges

PRODUCTS = ("Conv", "Gemm")  # what quantization pays for
BETWEEN = ("LeakyRelu", "Relu", "Add", "Concat", "MaxPool", "Split", "Resize")  # a float one breaks an INT8 chain
HEADS = "heads."  # the weights below it are those of a detector's heads: `detection.batched`


def products(graph: onnx.GraphProto) -> list[NodeProto]:
    """A graph's convolutions and matrix products with constant weights."""
    constants = {tensor.name for tensor in graph.initializer}
    return [node for node in graph.node if node.op_type in PRODUCTS and node.input[1] in constants]


def exclusions(graph: onnx.GraphProto) -> dict[str, set[str]]:
    """What may stay in float, by what to call it: names of products, fewest first; no two are the same."""
    found = products(graph)
    names = {node.name for node in found}
    ends = names & (_without_product_before(graph.node, names) | _without_product_after(graph.node, names))
    heads = {node.name for node in found if node.input[1].startswith(HEADS)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    grouped = {node.name for node in found if _is_grouped(node, weights[node.input[1]])}
    some = {"first and last": ends, "first, last and heads": ends | heads}
    with_grouped = {f"grouped, {title}": grouped | choice for title, choice in some.items()}
    choices = {"nothing": set[str](), "grouped": grouped} | some | with_grouped
    distinct: dict[str, set[str]] = {}
    for title, choice in sorted(choices.items(), key=lambda choice: len(choice[1])):
        if choice < names and choice not in distinct.values():
            distinct[title] = choice
    return distinct


def _is_grouped(node: NodeProto, weight: TensorProto) -> bool:
    """A convolution in groups of several channels, for which onnxruntime has no fast INT8 kernel."""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return groups > 1 and weight.dims[1] > 1


def _without_product_before(nodes: Iterable[NodeProto], names: set[str]) -> set[str]:
    after: set[str] = set()  # values that a product leads to
    first = set()
    for node in nodes:
        if after.isdisjoint(node.input):
            first.add(node.name)
        if node.name in names or not after.isdisjoint(node.input):
            after.update(node.output)
    return first


def _without_product_after(nodes: Iterable[NodeProto], names: set[str]) -> set[str]:
    before: set[str] = set()  # values that lead to a product
    last = set()
    for node in reversed(list(nodes)):
        if before.isdisjoint(node.output):
            last.add(node.name)
        if node.name in names or not before.isdisjoint(node.output):
            before.update(node.input)
    return last


def chains(graph: onnx.GraphProto, kept: set[str]) -> list[NodeProto]:
    """The nodes to quantize: products but those `kept`, and what lies between quantized nodes alone.

    So the float arithmetic round a network, such as the decoding of boxes, stays as it is.
    """
    names = {node.name for node in products(graph)} - kept
    floats = float_tensors(graph)
    inside: set[str] = set()
    chosen = []
    for node in graph.node:
        inputs = floats & set(node.input)
        if node.name in names or (node.op_type in BETWEEN and inputs and inputs <= inside):
            inside.update(node.output)
            chosen.append(node)
    wanted: set[str] = set()  # inputs of what stays
    staying = []
    for node in reversed(chosen):
        if node.name in names or not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            staying.append(node)
    return staying[::-1]


def float_tensors(graph: onnx.GraphProto) -> set[str]:
    """The names of a graph's float32 values, those of constants left out."""
    values = (*graph.input, *graph.value_info, *graph.output)
    found = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found - {tensor.name for tensor in graph.initializer}


def activations(graph: onnx.GraphProto) -> list[str]:
    """The tensors whose ranges `quantize` may need, in the order of the graph."""
    floats = float_tensors(graph)

    def named() -> Iterator[str]:
        for node in chains(graph, set()):
            yield from (name for name in (*node.input, *node.output) if name in floats)

    return list(dict.fromkeys(named()))


def quantize(model: onnx.ModelProto, ranges: Ranges, kept: set[str]) -> onnx.ModelProto:
    """The model in INT8, but for the products `kept`. Its operators are standard ONNX ones."""
    nodes = chains(model.graph, kept)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    ends = {name: tuple(np.float32(end) for end in pair) for name, pair in ranges.items()}
    tensors = TensorsData(
        CalibrationMethod.MinMax, {name: TensorData(lowest=low, highest=high) for name, (low, high) in ends.items()}
    )
    quantizer = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=tensors,
        nodes_to_quantize=[node.name for node in nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=sorted({node.op_type for node in nodes}),
        extra_options={},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    used = {node.domain for node in result.graph.node}
    imports = [entry for entry in result.opset_import if entry.domain in used]
    del result.opset_import[:]
    result.opset_import.extend(imports)
    return result
