"""Weights to artefact: one ONNX graph with normalisation and post-processing inside, compared with PyTorch
before the file appears under its name.

Shapes: N images, H x W pixels of a canvas, C classes.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from backbones.preprocess import ClassifierPreprocess, DetectorPreprocess
from backbones.published import protocol
from backbones.weights import read_metadata, read_weights, resolve
from detection.batched import BatchedDetector
from detection.models import thresholds
from detection.onnx_ops import translation_table
from detection.weights import load_detector
from serving.artifact import Artifact, ClassifierArtifact, DetectorArtifact, Parity, to_metadata
from serving.parity import compare_classifier, compare_detector, pictures
from serving.runtime import OnnxModel


class ExportedClassifier(nn.Module):
    """uint8 [N, H, W, 3] -> logits [N, C], probabilities [N, C]."""

    def __init__(self, model: CSPNet, preprocess: ClassifierPreprocess):
        super().__init__()
        self.model, self.preprocess = model, preprocess

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(normalize(images, self.preprocess))
        return logits, logits.softmax(1)


def run_export(weights: str, output: str | Path, *, model: str | None = None, images: str | None = None) -> Artifact:
    """Write an artefact from a classifier's or a detector's weights and return what it says about itself.

    Args:
        weights: a path, a URL, or `timm`; see `backbones.weights.load_weights`.
        model: the network's name, for weights that do not say it themselves.
        images: a folder of pictures to compare on; None draws some.

    Raises:
        InputError: weights that do not load, or a graph that differs from PyTorch.
    """
    if Path(output).suffix != ".onnx":
        raise InputError(f"-o {output}: an artefact's name ends in .onnx")
    check_writable(Path(output).parent)
    path = resolve(weights, get_variant(model)[0] if model else None)
    metadata = read_metadata(path)
    if metadata.get("task") == "detection":
        if model is not None:
            raise InputError(f"{weights} holds the detector {metadata['model']}: leave --model out")
        return _export_detector(path, Path(output), images)
    return _export_classifier(path, Path(output), metadata | ({"model": model} if model else {}), images)


def _export_classifier(weights: Path, output: Path, metadata: dict[str, Any], images: str | None) -> Artifact:
    if "model" not in metadata:
        raise InputError(f"{weights} does not say which network it is of: give --model, such as --model cspresnet50")
    name, _ = get_variant(metadata["model"])
    classes = metadata.get("classes") or class_names(_head_size(weights))
    model = create_model(name, len(classes), weights).eval()
    preprocess = ClassifierPreprocess.model_validate(metadata.get("preprocess", protocol(name)))
    artifact = ClassifierArtifact(
        model=name, classes=tuple(classes), preprocess=preprocess, parity=Parity(),
        weights_sha256=sha256(weights), config=metadata.get("config", {}), versions=_versions(),
    )  # fmt: skip
    compared = pictures(images, preprocess.resize, preprocess.resize)
    graph = _trace(
        ExportedClassifier(model, preprocess),
        {"images": torch.zeros(2, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)},
        ["logits", "probabilities"],
    )
    return _write(graph, artifact, output, lambda onnx_model: compare_classifier(model, onnx_model, compared))


def _head_size(weights: Path) -> int:
    head = read_weights(weights)[0].get("head.fc.weight")
    if head is None:
        raise InputError(f"{weights} has no classifier (head.fc.weight): give weights with one")
    return len(head)


def _export_detector(weights: Path, output: Path, images: str | None) -> Artifact:
    model, metadata = load_detector(weights)
    model.eval()
    preprocess = DetectorPreprocess.model_validate(metadata["preprocess"])
    artifact = DetectorArtifact(
        model=metadata["model"], classes=tuple(metadata["classes"]), category_ids=tuple(metadata["category_ids"]),
        preprocess=preprocess, parity=Parity(), weights_sha256=sha256(weights), config=metadata["config"],
        versions=_versions(), **thresholds(model),
    )  # fmt: skip
    compared = pictures(images, preprocess.max_size, preprocess.min_size)
    side = 2 * preprocess.divisor
    example = {
        "images": torch.zeros(2, side, side + preprocess.divisor, 3, dtype=torch.uint8),
        "sizes": torch.tensor([[side, side], [side - 1, side + 1]]),
    }
    graph = _trace(BatchedDetector(model), example, ["boxes", "scores", "labels", "num_detections"])
    return _write(graph, artifact, output, lambda onnx_model: compare_detector(model, onnx_model, compared))


def _trace(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> onnx.ModelProto:
    """The ONNX graph of a module, with N, H and W free."""
    free: dict[str, Any] = {"images": {0: Dim("N"), 1: Dim("H"), 2: Dim("W")}, "sizes": {0: Dim.AUTO}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own internals
        program = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, verbose=False,
            input_names=list(inputs), output_names=outputs, dynamic_shapes={name: free[name] for name in inputs},
            custom_translation_table=translation_table(),
        )  # fmt: skip
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of whoever exports
    return program.model_proto


def _write(
    graph: onnx.ModelProto, artifact: Artifact, output: Path, compare: Callable[[OnnxModel], Parity]
) -> Artifact:
    """Save with metadata, load as users will, compare, save with what was measured, rename into place."""
    onnx.checker.check_model(graph, full_check=True)
    with write_aside(output) as aside:
        _save(graph, artifact, aside)
        proven = artifact.model_copy(update={"parity": compare(OnnxModel(aside, provider="cpu"))})
        _save(graph, proven, aside)
    return proven


def _save(graph: onnx.ModelProto, artifact: Artifact, path: Path) -> None:
    onnx.helper.set_model_props(graph, to_metadata(artifact))  # replaces what was there
    onnx.save(graph, path)


def _versions() -> dict[str, str]:
    return versions("cspnet", "torch", "torchvision", "onnx", "onnxscript") | {"onnxruntime": onnxruntime.__version__}
