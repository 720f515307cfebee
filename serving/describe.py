"""What `python -m serving inspect` prints of an artefact; it is read and not run; no torch here."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from serving.artifact import KEY, Artifact, ClassifierArtifact, DetectorArtifact, from_metadata, read_whole

SHOWN = 8  # classes, and kinds of operators, that the text names
# Lines that meet, by whether one goes left, right, up and down.
_CORNERS = {
    (1, 1, 0, 0): "─", (1, 0, 0, 1): "┐", (1, 0, 1, 0): "┘", (1, 0, 1, 1): "┤", (0, 1, 0, 1): "┌", (0, 1, 1, 0): "└",
    (0, 1, 1, 1): "├", (1, 1, 0, 1): "┬", (1, 1, 1, 0): "┴", (1, 1, 1, 1): "┼", (0, 0, 1, 1): "│", (0, 0, 0, 0): " ",
}  # fmt: skip


def describe(path: str | Path) -> dict[str, Any]:
    """What can be said of an artefact without running it, ready for JSON.

    Raises:
        InputError: as of `serving.artifact.read_artifact`.
    """
    _, model, artifact, digest = read_whole(path)
    weights = [
        tensor for tensor in model.graph.initializer if tensor.data_type not in (TensorProto.INT64, TensorProto.BOOL)
    ]
    return {
        "file": Path(path).name,
        "bytes": Path(path).stat().st_size,
        "sha256": digest,
        "inputs": [_tensor(value) for value in model.graph.input],
        "outputs": [_tensor(value) for value in model.graph.output],
        "parameters": sum(math.prod(tensor.dims) for tensor in weights),
        "operators": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "metadata": artifact.model_dump(mode="json"),
    }


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [side.dim_param or (side.dim_value if side.HasField("dim_value") else "?") for side in kind.shape.dim]
    name = TensorProto.DataType.Name(kind.elem_type).lower()
    return {"name": value.name, "type": {"float": "float32"}.get(name, name), "shape": shape}


def summary(description: dict[str, Any]) -> Iterator[str]:
    """A description as lines for people; long lists are cut short and say so."""
    artifact = from_metadata({KEY: json.dumps(description["metadata"])}, description["file"])
    yield f"{description['file']}: {artifact.model}, {artifact.task}, {artifact.precision}"
    yield ""
    yield from picture(_columns(description["inputs"]), artifact.model, _columns(description["outputs"]))
    yield ""
    for name, value in _facts(description, artifact):
        yield f"{name:<14}{value}"


def _facts(description: dict[str, Any], artifact: Artifact) -> Iterator[tuple[str, str]]:
    size = f"{description['bytes'] / 1e6:.1f} MB, {description['parameters'] / 1e6:.2f} M parameters"
    yield "classes", f"{len(artifact.classes)}: {_shortened(artifact.classes)}"
    yield "preprocess", str(artifact.preprocess)
    if isinstance(artifact, ClassifierArtifact):
        yield "size", f"{size}, {artifact.gmacs:.3g} GMACs for an image"
    else:
        least, largest = ("×".join(map(str, pick(artifact.canvases, key=math.prod))) for pick in (min, max))
        yield "canvases", f"{len(artifact.canvases)}, from {least} to {largest} (height×width)"
        yield (
            "detections",
            (
                f"scores above {artifact.score_threshold:g}, NMS at IoU {artifact.nms_iou:g}, "
                f"at most {artifact.max_detections} of an image" + "; raw heads, not applied" * (not artifact.nms)
            ),
        )
        yield "size", f"{size}, {artifact.gmacs:.3g} GMACs for an image on {largest}"
    operators = [f"{name} {count}" for name, count in description["operators"].items()]
    total = sum(description["operators"].values())
    yield "graph", f"opset {artifact.opset}, {total} operators: {_shortened(operators)}"
    parity = artifact.parity
    if parity.images:
        off = ", ".join(f"{name} {value:.2g}" for name, value in parity.largest.items())
        yield "parity", f"off PyTorch by {off}, on {parity.images} images in batches of {_joined(parity.batch_sizes)}"
    if parity.images and isinstance(artifact, DetectorArtifact):
        yield "", f"{parity.unmatched} of {parity.detections} detections unmatched"
    if parity.agreement is not None:
        yield "", f"the same best class for {parity.agreement:.1%} of the images"
    yield "self-test", _self_test(artifact)
    made = artifact.quantization
    if made is not None:
        yield (
            "quantization",
            (
                f"{made.method} over {made.images} images, {made.kept_float} operators in float: {made.metric} "
                f"{made.before:.4f} before, {made.after:.4f} after on {made.evaluated} images; "
                + " and ".join(f"{times:.2f}" for times in made.speedup.values())
                + f" times as fast at batch {_joined(made.speedup)}"
                + "; forced" * made.forced
            ),
        )
    yield "made with", ", ".join(f"{name} {version}" for name, version in artifact.versions.items())
    yield "weights", f"SHA-256 {artifact.weights_sha256}"
    yield "file", f"SHA-256 {description['sha256']}"


def _self_test(artifact: Artifact) -> str:
    kept = artifact.self_test
    if kept is None:
        return "none"
    if not kept.indices:
        return "nothing is found in the known images: a weak test"
    what = "logits" if isinstance(artifact, ClassifierArtifact) else "detections"
    best = f"{artifact.classes[kept.indices[0]]} {kept.values[0]:.3g}"
    return f"{len(kept.indices)} {what} of known image {kept.image}, the best {best}"


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _joined(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _columns(tensors: Sequence[dict[str, Any]]) -> list[str]:
    """Name, type and shape of each tensor, one below the other."""
    rows = [(tensor["name"], tensor["type"], f"[{', '.join(map(str, tensor['shape']))}]") for tensor in tensors]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [" ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def picture(inputs: Sequence[str], name: str, outputs: Sequence[str]) -> list[str]:
    """Inputs, in lines of one width, joined to a name, and that to outputs."""
    height = max(len(inputs), len(outputs))
    middle = (height - 1) // 2
    left, right = ((height - len(side)) // 2 for side in (inputs, outputs))
    lines = []
    for row in range(height):
        entry = inputs[row - left] if 0 <= row - left < len(inputs) else ""
        exit_ = outputs[row - right] if 0 <= row - right < len(outputs) else ""
        is_middle = row == middle
        joint = _corner(row, middle, left, len(inputs), bool(entry), is_middle)
        fork = _corner(row, middle, right, len(outputs), is_middle, bool(exit_))
        text = f"─ {name} ─" if is_middle else " " * (len(name) + 4)
        begin, end = ("─" if entry else " "), ("─" if exit_ else " ")
        lines.append(f"  {entry:<{len(inputs[0])}} {begin}{joint}{text}{fork}{end} {exit_}".rstrip())
    return lines


def _corner(row: int, middle: int, first: int, count: int, is_left: bool, is_right: bool) -> str:
    top, bottom = min(first, middle), max(first + count - 1, middle)
    return _CORNERS[is_left, is_right, top < row <= bottom, top <= row < bottom]
