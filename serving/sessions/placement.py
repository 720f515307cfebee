"""What of a graph stays on the CPU where a GPU runs the rest; no torch here."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_LAYER = "on_cpu"
# Before they knew it, onnxruntime's releases ignored the entry, and were as slow as said below.
CONFIG_ENTRY = ("session.layer_assignment_settings", f"cpu(={_LAYER})")


def mark_nms(model: "onnx.ModelProto") -> None:
    """Mark, in place, a detector's last NMS, that of its classes, for the CPU: with `CONFIG_ENTRY` it runs there.

    onnxruntime's CUDA kernel suppresses one class of one image after the other and waits for each, 0.15 ms on an H200:
    8 images of 90 classes are 720 of them, and take longer than the network. One core of a CPU needs a millisecond an
    image. What lays the scores out by class goes with it, so that less is copied. The NMS of a Faster R-CNN's proposals
    has few problems, and large ones, and stays on the GPU.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    found = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"]
    if not found:
        return
    marked = [found[-1]]
    scores = made.get(found[-1].input[1])
    if scores is not None and scores.op_type == "Where":  # by class: a box's score in its own, none in the others
        marked += [scores, *filter(None, [made.get(scores.input[0])])]
    for node in marked:
        del node.metadata_props[:]  # it may be the second time
        node.metadata_props.add(key="layer_ann", value=_LAYER)
