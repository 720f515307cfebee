"""Encoded images to results: the one path that endpoints, batch jobs and evaluation share; no Ray, no torch here.

Shapes: K detections of an image, C classes, k the best of them.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from backbones.errors import InputError
from backbones.metrics import rank
from backbones.preprocess import Fitted, Pixels, canvas_size, classifier_pixels, decode, detector_pixels, stack
from detection.masks import PastedMasks, RunLengths
from serving.artifact import Artifact, ClassifierArtifact, DetectorArtifact
from serving.runtime import OnnxModel

# An image: encoded, of a path, uint8 [H, W, 3] in RGB, or what `decode` gave
Source = bytes | str | Path | Pixels | Image.Image


@dataclass(frozen=True)
class Classification:
    """An image's classes, best first: `indices` int64 [C], `probabilities` float32 [C]."""

    indices: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Detections:
    """An image's detections, best first: `boxes` float32 [K, 4] as x1, y1, x2, y2 in pixels of the upright
    original, `scores` float32 [K], `indices` int64 [K] into the artefact's classes; `size` is (height, width).
    `masks` are in the original's size, of an artefact that has them.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    indices: npt.NDArray[np.int64]
    size: tuple[int, int]
    masks: PastedMasks | list[RunLengths] | None = None


class Classifier:
    """Images through a classifier's artefact."""

    def __init__(self, model: OnnxModel, metadata: ClassifierArtifact):
        self.model, self.metadata = model, metadata

    def prepare(self, image: Source) -> Pixels:
        """Decode, resize and crop one image.

        Raises:
            ImageError: it cannot be decoded.
        """
        return prepare(image, self.metadata)

    def inputs(self, prepared: Sequence[Pixels]) -> dict[str, npt.NDArray[Any]]:
        """What the artefact takes, of images that `prepare` gave."""
        return {"images": np.stack(prepared)}

    def predict(self, prepared: Sequence[Pixels]) -> list[Classification]:
        """Results in the order of the images that `prepare` gave."""
        outputs = self.model.run(**self.inputs(prepared))
        indices = rank(outputs["logits"], len(self.metadata.classes))
        probabilities = np.take_along_axis(outputs["probabilities"], indices, axis=1)
        return [Classification(i, p) for i, p in zip(indices, probabilities, strict=True)]


class Detector:
    """Images through a detector's artefact. On the CPU, what an image gets does not depend on its batch."""

    def __init__(self, model: OnnxModel, metadata: DetectorArtifact):
        self.model, self.metadata = model, metadata

    def prepare(self, image: Source) -> Fitted:
        """Decode and resize one image.

        Raises:
            ImageError: it cannot be decoded.
        """
        return prepare(image, self.metadata)

    def inputs(self, prepared: Sequence[Fitted]) -> dict[str, npt.NDArray[Any]]:
        """What the artefact takes, of images of one canvas that `prepare` gave."""
        images, sizes = stack([item.pixels for item in prepared], self.metadata.preprocess.divisor)
        return {"images": images, "sizes": sizes}

    def predict(self, prepared: Sequence[Fitted]) -> list[Detections]:
        """Results in the order of the images that `prepare` gave; images of one canvas run together."""
        divisor = self.metadata.preprocess.divisor
        canvases: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, item in enumerate(prepared):
            canvases[canvas_size(item.pixels, divisor)].append(i)
        results: dict[int, Detections] = {}
        for members in canvases.values():
            outputs = self.model.run(**self.inputs([prepared[i] for i in members]))
            for row, i in enumerate(members):
                results[i] = _detections(outputs, row, prepared[i])
        return [results[i] for i in range(len(prepared))]


def prepare(image: Source, artifact: Artifact) -> Any:
    """What the predictor of an artefact takes of one image, `Pixels` or `Fitted`, without a model to run it.

    Raises:
        ImageError: it cannot be decoded.
    """
    if isinstance(artifact, ClassifierArtifact):
        return classifier_pixels(_picture(image), artifact.preprocess)
    return detector_pixels(_picture(image), artifact.preprocess)


def _picture(image: Source) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image) if isinstance(image, np.ndarray) else decode(image)


def _detections(outputs: dict[str, npt.NDArray[Any]], row: int, item: Fitted) -> Detections:
    k = int(outputs["num_detections"][row])
    masks = outputs["masks"][row, :k] if "masks" in outputs else None
    return detections(outputs["boxes"][row, :k], outputs["scores"][row, :k], outputs["labels"][row, :k], item, masks)


def detections(
    boxes: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    item: Fitted,
    masks: npt.NDArray[np.float32] | None = None,
) -> Detections:
    """A detector's own output for one image; masks are [K, 28, 28]. Label 0, the background, is no detection:
    one-stage detectors have an output for it that training never asks for.
    """
    object_ = labels > 0
    boxes = item.to_original(boxes[object_])
    pasted = None if masks is None else PastedMasks(masks[object_], boxes, item.original)
    return Detections(boxes, scores[object_], labels[object_] - 1, item.original, pasted)


Predictor = Classifier | Detector


def create_predictor(model: OnnxModel) -> Predictor:
    """The predictor for an artefact's task.

    Raises:
        InputError: the artefact's outputs are raw heads, which are no detections yet.
    """
    if isinstance(model.metadata, ClassifierArtifact):
        return Classifier(model, model.metadata)
    if not model.metadata.nms:
        raise InputError(f"{model.path} has raw heads, not detections: export without --no-nms to run it here")
    return Detector(model, model.metadata)
