"""Weights to artefact: one ONNX graph with normalisation and post-processing inside, compared with PyTorch
before the file appears under its name.

Shapes: N images, H x W pixels of a canvas, C classes.
"""

import ast
import copy
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

from backbones.cspnet import CSPNet, create_model, get_variant
from backbones.engine import normalize
from backbones.errors import InputError
from backbones.files import check_writable, sha256, versions, write_aside
from backbones.labels import class_names
from backbones.preprocess import ClassifierPreprocess, DetectorPreprocess, canvases
from backbones.profile import count
from backbones.published import protocol
from backbones.weights import read_metadata, read_weights, resolve
from detection.batched import BatchedDetector, output_names
from detection.config import DetectorSettings
from detection.models import has_masks, thresholds
from detection.onnx_ops import translation_table
from detection.profile import gmacs
from detection.spec import checked
from detection.weights import load_detector
from serving import selftest
from serving.artifact import Artifact, ClassifierArtifact, DetectorArtifact, Parity, write_artifact
from serving.graph.half import to_half
from serving.parity import compare_classifier, compare_detector, pictures
from serving.runtime import OnnxModel

OPSET = 18  # the one in which the exporter writes its operators: no version converter runs over the graph
SHORTEST_SIDE = 32  # pixels, that tracing is told of; nothing in the graph depends on it
FloatPrecision = Literal["fp32", "fp16"]
# What this project's own modules do around the networks, normalising, decoding and choosing, is exact in float alone.
KEPT_FLOAT = ("serving.", "detection.batched", "detection.dense_heads", "detection.region_heads")


class ExportedClassifier(nn.Module):
    """uint8 [N, H, W, 3] -> logits [N, C], probabilities [N, C]."""

    def __init__(self, model: CSPNet, preprocess: ClassifierPreprocess):
        super().__init__()
        self.model, self.preprocess = model, preprocess

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(normalize(images, self.preprocess))
        return logits, logits.softmax(1)


def run_export(
    weights: str,
    output: str | Path,
    *,
    model: str | None = None,
    images: str | None = None,
    precision: FloatPrecision = "fp32",
    nms: bool = True,
    **settings: float | None,
) -> Artifact:
    """Write an artefact from a classifier's or a detector's weights and return what it says about itself.

    The same weights and arguments give the same bytes, on one machine: the measured parity among them depends on its
    arithmetic.

    Args:
        weights: a path, a URL, or `timm`; see `backbones.weights.load_weights`.
        model: the network's name, for weights that do not say it themselves.
        images: a folder of pictures to compare on; None draws some.
        precision: fp16 keeps in float what chooses boxes, and inputs and outputs.
        nms: False gives a detector's raw heads; see `detection.batched`.
        settings: `score_threshold`, `nms_iou` and `max_detections` of a detector, over those of its weights.

    Raises:
        InputError: weights that do not load, settings that do not fit, or a graph that differs from PyTorch.
    """
    if Path(output).suffix != ".onnx":
        raise InputError(f"-o {output}: an artefact's name ends in .onnx")
    check_writable(Path(output).parent)
    path = resolve(weights, get_variant(model)[0] if model else None)
    metadata = read_metadata(path)
    settings = {name: value for name, value in settings.items() if value is not None}
    if metadata.get("task") == "detection":
        if model is not None:
            raise InputError(f"{weights} holds the detector {metadata['model']}: leave --model out")
        checked(DetectorSettings, {"model": metadata["model"], **settings}, "export")
        return _export_detector(path, Path(output), images, precision, nms, settings)
    if settings or not nms:
        given = ", ".join([*settings, *([] if nms else ["no_nms"])])
        raise InputError(f"{weights} holds a classifier, which has no {given}: leave it out")
    metadata |= {"model": model} if model else {}
    return _export_classifier(path, Path(output), metadata, images, precision)


def _export_classifier(
    weights: Path, output: Path, metadata: dict[str, Any], images: str | None, precision: FloatPrecision
) -> Artifact:
    if "model" not in metadata:
        raise InputError(f"{weights} does not say which network it is of: give --model, such as --model cspresnet50")
    name, _ = get_variant(metadata["model"])
    classes = metadata.get("classes") or class_names(_head_size(weights))
    model = create_model(name, len(classes), weights).eval()
    preprocess = ClassifierPreprocess.model_validate(metadata.get("preprocess", protocol(name)))
    compared = pictures(images, preprocess.resize, preprocess.resize)
    cost = count(copy.deepcopy(model).to("meta"), preprocess.crop)
    artifact = ClassifierArtifact(
        model=name, classes=tuple(classes), preprocess=preprocess, gmacs=cost.bflops / 2,
        **_common(weights, metadata, precision),
    )  # fmt: skip
    graph = trace(
        ExportedClassifier(model, preprocess),
        {"images": torch.zeros(2, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)},
        ["logits", "probabilities"],
        precision,
    )
    return _write(graph, artifact, output, lambda onnx_model: compare_classifier(model, onnx_model, compared))


def _head_size(weights: Path) -> int:
    head = read_weights(weights)[0].get("head.fc.weight")
    if head is None:
        raise InputError(f"{weights} has no classifier (head.fc.weight): give weights with one")
    return len(head)


def _export_detector(
    weights: Path, output: Path, images: str | None, precision: FloatPrecision, nms: bool, settings: Mapping[str, Any]
) -> Artifact:
    model, metadata = load_detector(weights, **settings)
    model.eval()
    preprocess = DetectorPreprocess.model_validate(metadata["preprocess"])
    compared = pictures(images, preprocess.max_size, preprocess.min_size)
    all_canvases = canvases(preprocess)
    artifact = DetectorArtifact(
        model=metadata["model"], classes=tuple(metadata["classes"]), category_ids=tuple(metadata["category_ids"]),
        preprocess=preprocess, canvases=all_canvases, masks=nms and has_masks(model), nms=nms,
        gmacs=gmacs(model, max(all_canvases, key=math.prod)), **thresholds(model),
        **_common(weights, metadata, precision),
    )  # fmt: skip
    side = 2 * preprocess.divisor
    example = {
        "images": torch.zeros(2, side, side + preprocess.divisor, 3, dtype=torch.uint8),
        "sizes": torch.tensor([[side, side], [side - 1, side + 1]]),
    }
    graph = trace(BatchedDetector(model, nms), example, output_names(model, nms), precision)
    return _write(graph, artifact, output, lambda onnx_model: compare_detector(model, onnx_model, compared))


def _common(weights: Path, metadata: Mapping[str, Any], precision: FloatPrecision) -> dict[str, Any]:
    made_with = versions("cspnet", "torch", "torchvision", "onnx", "onnxscript")
    return {
        "precision": precision,
        "opset": OPSET,
        "weights_sha256": sha256(weights),
        "config": without_paths(metadata.get("config", {})),
        "versions": made_with | {"onnxruntime": onnxruntime.__version__},
        "parity": Parity(),
    }


def without_paths(config: Any) -> Any:
    """A config without the absolute paths and URLs in it: an artefact is given away, and they are of who trained it."""
    if isinstance(config, Mapping):
        return {key: without_paths(value) for key, value in config.items() if not _is_place(value)}
    if isinstance(config, list | tuple):
        return [without_paths(value) for value in config if not _is_place(value)]
    return config


def _is_place(value: object) -> bool:
    if not isinstance(value, str):
        return False
    is_path = value.startswith("~") or PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return is_path or "://" in value


def trace(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: list[str], precision: FloatPrecision = "fp32"
) -> onnx.ModelProto:
    """The ONNX graph of a module, with N, H and W free, and nodes named after the modules that they come from."""
    # torch.export refuses some detectors, such as RetinaNet on darknetaa53, unless told that no side is shorter; a side
    # of that length itself it would take for a constant.
    least = SHORTEST_SIDE if "sizes" in inputs and min(inputs["images"].shape[1:3]) > SHORTEST_SIDE else None
    sides = {1: Dim("H", min=least), 2: Dim("W", min=least)}
    free: dict[str, Any] = {"images": {0: Dim("N")} | sides, "sizes": {0: Dim.AUTO}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own internals
        program = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=list(inputs), output_names=outputs, dynamic_shapes={name: free[name] for name in inputs},
            custom_translation_table=translation_table(),
        )  # fmt: skip
    assert program is not None
    graph = program.model_proto
    modules = _name_nodes(graph.graph)
    if precision == "fp16":
        types = {name: type(part).__module__ for name, part in module.named_modules(remove_duplicate=False)}
        to_half(graph, {node for node, name in modules.items() if not types[name].startswith(KEPT_FLOAT)})
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _name_nodes(graph: onnx.GraphProto) -> dict[str, str]:
    """Name nodes after their modules, and drop what else the exporter notes down, the paths of whoever exports in it.

    Returns:
        By a node's name the name of its module.
    """
    modules: dict[str, str] = {}
    maker: dict[str, str] = {}  # of a value: its module
    for node in graph.node:
        said = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
        # A list of the modules' names from the outermost, '', to the innermost, and the operation's; nothing of what
        # the exporter's optimizer made, which goes with its input.
        scopes = ast.literal_eval(said) if said else [maker.get(node.input[0], "") if node.input else "", ""]
        module = scopes[-2] if scopes[0] == "" or not said else ""
        maker |= dict.fromkeys(node.output, module)
        node.name = "/".join(filter(None, [*module.split("."), node.name.removeprefix("node_")]))
        modules[node.name] = module
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return modules


def _write(
    graph: onnx.ModelProto, artifact: Artifact, output: Path, compare: Callable[[OnnxModel], Parity]
) -> Artifact:
    """Save with metadata, load as users will, compare, save with what was measured, rename into place."""
    with write_aside(output) as aside:
        write_artifact(graph, artifact, aside)
        model = OnnxModel(aside, provider="cpu")
        answers = not isinstance(artifact, DetectorArtifact) or artifact.nms
        proven = artifact.model_copy(
            update={"parity": compare(model), "self_test": selftest.record(model) if answers else None}
        )
        write_artifact(graph, proven, aside)
    return proven
