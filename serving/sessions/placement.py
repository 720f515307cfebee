"""What of a graph stays on the CPU where a GPU runs the rest; no torch here."""

_LAYER = "on_cpu"
# A session's configuration entry. Releases of onnxruntime before it ignore it, and are as slow as is said below.
NMS_ON_CPU = ("session.layer_assignment_settings", f"cpu(={_LAYER})")


def with_nms_on_cpu(content: bytes) -> bytes:
    """A detector's graph with the NMS of its classes marked for the CPU, where it runs by the entry `NMS_ON_CPU`.

    onnxruntime's CUDA kernel suppresses one class of one image after the other and waits for each, 0.15 ms on an H200:
    8 images of 90 classes are 720 of them, and take longer than the network. One core of a CPU needs a millisecond an
    image. What lays the scores out by class goes with it, so that less is copied. The NMS of a Faster R-CNN's proposals
    comes before it in the graph; it has few problems, and large ones, and stays on the GPU.
    """
    import onnx

    model = onnx.load_from_string(content)
    made = {name: node for node in model.graph.node for name in node.output}
    nms = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"][-1:]
    marked = list(nms)
    for scores in (made.get(node.input[1]) for node in nms):
        if scores is not None and scores.op_type == "Where":  # a box's score in its own class, none in the others
            marked += [scores, *filter(None, [made.get(scores.input[0])])]
    for node in marked:
        node.metadata_props.add(key="layer_ann", value=_LAYER)
    return bytes(model.SerializeToString())
