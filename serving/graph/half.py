"""A float32 graph's networks in float16; no torch here.

onnxruntime's own `convert_float_to_float16` rounds also what flows between two nodes that stay in float32, and a box at
1300 pixels is then half a pixel off. Here a value is rounded only where it enters a network or is made in one.
"""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Whose kernels are safe in float16: sums over whole maps, as of means and norms, are not.
HALF_OPERATORS = {
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Flatten", "Gemm", "LeakyRelu", "MatMul",
    "MaxPool", "Mul", "Relu", "Reshape", "Resize", "Sigmoid", "Split", "Sub", "Transpose",
}  # fmt: skip
LARGEST = float(np.finfo(np.float16).max)


def to_half(model: onnx.ModelProto, networks: Collection[str]) -> None:
    """Turn to float16, in place, the nodes of these names whose operators allow it, with their weights.

    The graph's inputs and outputs keep their types; nodes of other names compute in float32, as before.
    """
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *graph.input)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types |= {name: tensor.data_type for name, tensor in weights.items()}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.output}
    results = {value.name for value in graph.output}

    half = [node for node in graph.node if node.name in networks and node.op_type in HALF_OPERATORS]
    made = {name for node in half for name in node.output if types.get(name) == TensorProto.FLOAT}
    made -= results
    names = {node.name for node in half}
    nodes: list[onnx.NodeProto] = []
    cast: set[str] = set()  # values that exist in both types by now

    def in_type(name: str, to_half: bool) -> str:
        """The name under which a value is there in the type."""
        if types.get(name) != TensorProto.FLOAT or (name in made) == to_half:
            return name
        other = f"{name}/{'half' if to_half else 'float'}"
        if other not in cast:
            cast.add(other)
            if name in weights:
                graph.initializer.append(_halved(weights[name], other))
            else:
                to = TensorProto.FLOAT16 if to_half else TensorProto.FLOAT
                nodes.append(helper.make_node("Cast", [name], [other], name=other, to=to))
        return other

    for node in graph.node:
        is_half = node.name in names
        for i, name in enumerate(node.input):
            always_float = node.op_type == "Resize" and i > 0  # its scales
            node.input[i] = in_type(name, is_half and not always_float)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if is_half and name in results and types[name] == TensorProto.FLOAT:
                node.output[i] = f"{name}/half"
                nodes.append(
                    helper.make_node("Cast", [f"{name}/half"], [name], name=f"{name}/float", to=TensorProto.FLOAT)
                )
    _replace(graph, nodes)


def _halved(tensor: TensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(tensor).clip(-LARGEST, LARGEST)
    return numpy_helper.from_array(values.astype(np.float16), name)


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """The graph's nodes, without weights that none takes and without shapes and types that no longer hold."""
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(copies)
    graph.initializer.extend(kept)
