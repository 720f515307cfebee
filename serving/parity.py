"""How far an artefact is from PyTorch, measured on pictures; export refuses what is too far.

Shapes: N images, C classes, K detections of an image.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.models.detection import FasterRCNN
from torchvision.ops import batched_nms

from backbones.cspnet import CSPNet
from backbones.engine import normalize
from backbones.errors import InputError
from backbones.files import list_images
from backbones.preprocess import Fitted, canvas_size, classifier_pixels, decode, detector_pixels, stack
from detection.families import Detector
from detection.images import to_image
from serving.artifact import ClassifierArtifact, DetectorArtifact, Parity
from serving.runtime import OnnxModel
from serving.shapes import CLASSES, background, draw_shape

BATCH_SIZES = (1, 3, 8)
PICTURES = 4
SHORT_SIDE = 200  # pixels at most, of drawn pictures
# What an artefact's precision may cost: logits in units of their spread, probabilities, boxes in pixels of the resized
# image. INT8 is not held to PyTorch's numbers: `quantize` holds it to its accuracy.
TOLERANCE = {
    "fp32": {"logits": 1e-4, "probabilities": 1e-4, "scores": 1e-4, "boxes": 1e-2, "masks": 1e-3},
    "fp16": {"logits": 2e-2, "probabilities": 2e-2, "scores": 2e-2, "boxes": 4.0, "masks": 1e-1},
}
NEAR = {"fp32": 0.1, "fp16": 8.0, "int8": 16.0}  # pixels; further apart they are two detections
# Share of detections that may have no partner. Of two that overlap and score alike, rounding decides which NMS keeps.
UNMATCHED = {"fp32": 0.01, "fp16": 0.1}

T = TypeVar("T")
Output: TypeAlias = dict[str, npt.NDArray[Any]]  # boxes [K, 4], scores [K], labels [K], maybe masks [K, 28, 28]


def pictures(folder: str | Path | None, width: int, height: int) -> list[Image.Image]:
    """A few pictures to compare on: from a folder, or drawn.

    Those drawn are two landscapes as long as `width` and at most half as high as `height`, one of them without an
    object, and a portrait and a smaller landscape with many: batches of full size would take longer than the rest of an
    export.

    Raises:
        InputError: the folder has too few.
    """
    if folder is not None:
        paths = list_images(Path(folder))[:PICTURES]
        if len(paths) < PICTURES:
            raise InputError(f"--images {folder} has {len(paths)} images: give a folder with at least {PICTURES}")
        return [decode(path) for path in paths]
    long, short = width, max(1, min(height // 2, SHORT_SIDE))
    return [
        _drawn(0, long, short, 4),
        _drawn(1, long, short, 0),
        _drawn(2, short, long, 60),
        _drawn(3, long // 2, short // 2, 30),
    ]


def _drawn(seed: int, width: int, height: int, objects: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = background(rng, width, height)
    for i in range(objects):
        x, y = rng.uniform(0.1, 0.9, 2) * (width, height)
        draw_shape(rng, image, CLASSES[i % len(CLASSES)], rng.uniform(0.05, 0.2) * min(width, height), x, y)
    return image


def compare_classifier(
    model: CSPNet, onnx_model: OnnxModel, images: Iterable[Image.Image], batch_sizes: Sequence[int] = BATCH_SIZES
) -> Parity:
    """`measure_classifier`, held to the tolerances.

    Raises:
        InputError: a difference is over its tolerance.
    """
    return _accept(measure_classifier(model, onnx_model, images, batch_sizes), onnx_model)


def compare_detector(
    model: Detector, onnx_model: OnnxModel, images: Iterable[Image.Image], batch_sizes: Sequence[int] = BATCH_SIZES
) -> Parity:
    """`measure_detector`, held to the tolerances.

    Raises:
        InputError: a difference is over its tolerance, or more than a few detections have no match.
    """
    return _accept(measure_detector(model, onnx_model, images, batch_sizes), onnx_model)


@torch.inference_mode()
def measure_classifier(
    model: CSPNet, onnx_model: OnnxModel, images: Iterable[Image.Image], batch_sizes: Sequence[int] = BATCH_SIZES
) -> Parity:
    """Largest differences of logits (in units of their spread) and probabilities, each image in batches of each size,
    and how often the best class is the same.
    """
    assert isinstance(onnx_model.metadata, ClassifierArtifact)
    preprocess = onnx_model.metadata.preprocess
    largest = {"logits": 0.0, "probabilities": 0.0}
    same = count = total = 0
    pixels = (classifier_pixels(image, preprocess) for image in images)
    for group in _grouped(pixels, np.shape, max(batch_sizes)):
        expected = model(normalize(torch.from_numpy(np.stack(group)), preprocess))
        logits, probabilities = expected.numpy(), expected.softmax(1).numpy()
        total += len(group)
        for batch in _batches(len(group), batch_sizes):
            found = onnx_model.run(images=np.stack([group[i] for i in batch]))
            off = {
                "logits": np.abs(found["logits"] - logits[batch]).max() / np.ptp(logits),
                "probabilities": np.abs(found["probabilities"] - probabilities[batch]).max(),
            }
            largest = {name: larger(value, off[name]) for name, value in largest.items()}
            same += int((found["logits"].argmax(1) == logits[batch].argmax(1)).sum())
            count += len(batch)
    return Parity(batch_sizes=tuple(batch_sizes), images=total, agreement=same / max(count, 1), largest=largest)


@torch.inference_mode()
def measure_detector(
    model: Detector, onnx_model: OnnxModel, images: Iterable[Image.Image], batch_sizes: Sequence[int] = BATCH_SIZES
) -> Parity:
    """Largest differences of matched detections' scores, boxes and masks from torchvision's own, which sees each image
    alone; the artefact sees it in batches of each size, with others of its canvas.

    A detection near the score threshold, or near the score of the last one kept, may be on one side alone. Of raw heads
    the detections are chosen here, and then they are compared.
    """
    metadata = onnx_model.metadata
    assert isinstance(metadata, DetectorArtifact)
    if not metadata.nms and not isinstance(model, FasterRCNN):
        model = copy.copy(model)
        model.topk_candidates = sys.maxsize  # raw heads do not say of which level's best a pair is
    divisor = metadata.preprocess.divisor
    fitted = (detector_pixels(image, metadata.preprocess) for image in images)
    match, total = Match(metadata), 0
    for group in _grouped(fitted, lambda item: canvas_size(item.pixels, divisor), max(batch_sizes)):
        expected = [_torchvision(model, item) for item in group]
        total += len(group)
        for batch in _batches(len(group), batch_sizes):
            canvas, sizes = stack([group[i].pixels for i in batch], divisor)
            outputs = onnx_model.run(images=canvas, sizes=sizes)
            for row, i in enumerate(batch):
                found = _one(outputs, row, metadata)
                match.add(expected[i], found)
                match.add(found, expected[i])
    return Parity(
        batch_sizes=tuple(batch_sizes), images=total, detections=match.detections, unmatched=match.unmatched,
        largest=match.largest,
    )  # fmt: skip


def _torchvision(model: Detector, item: Fitted) -> Output:
    output = model([to_image(torch.from_numpy(item.pixels.copy()))])[0]
    found = {name: value.numpy() for name, value in output.items()}
    return found | ({"masks": found["masks"][:, 0]} if "masks" in found else {})


def _one(outputs: Output, row: int, metadata: DetectorArtifact) -> Output:
    if not metadata.nms:
        return _choose(outputs["boxes"][row], outputs["scores"][row], metadata)
    k = int(outputs["num_detections"][row])
    return {name: value[row, :k] for name, value in outputs.items() if name != "num_detections"}


def _choose(boxes: npt.NDArray[np.float32], scores: npt.NDArray[np.float32], metadata: DetectorArtifact) -> Output:
    """Detections of one image's raw heads: boxes [M, 4] for all classes or [M, C, 4], scores [M, C]."""
    row, column = np.nonzero(scores > metadata.score_threshold)
    chosen, values = boxes[row] if boxes.ndim == 2 else boxes[row, column], scores[row, column]
    labels = column if boxes.ndim == 2 else column + 1  # two-stage heads leave out the background
    keep = batched_nms(*map(torch.from_numpy, (chosen, values, labels)), metadata.nms_iou)[: metadata.max_detections]
    return {"boxes": chosen[keep], "scores": values[keep], "labels": labels[keep]}


@dataclass
class Match:
    """What detections that find each other differ by, and how many find none."""

    metadata: DetectorArtifact
    detections: int = 0
    unmatched: int = 0
    largest: dict[str, float] = field(default_factory=lambda: {"scores": 0.0, "boxes": 0.0})

    def add(self, one: Output, other: Output) -> None:
        """Look for each detection of `one` in `other`, best first: the nearest of its class that is not taken, in box
        and score, for boxes without an area may lie in one place and none suppresses the other.
        """
        tolerance = TOLERANCE["fp16" if self.metadata.precision != "fp32" else "fp32"]
        floor = self.metadata.score_threshold
        if len(one["scores"]) == self.metadata.max_detections:
            floor = max(floor, float(one["scores"][-1]))
        free = np.ones(len(other["labels"]), bool)
        for i, (box, score, label) in enumerate(zip(one["boxes"], one["scores"], one["labels"], strict=True)):
            same = np.flatnonzero(free & (other["labels"] == label))
            off = np.abs(other["boxes"][same] - box).max(1)
            score_off = np.abs(other["scores"][same] - score)
            if len(off) and off.min() < NEAR[self.metadata.precision]:
                nearest = (off / tolerance["boxes"] + score_off / tolerance["scores"]).argmin()
                j = same[nearest]
                free[j] = False
                self.detections += 1
                self._differ("boxes", off[nearest])
                self._differ("scores", score_off[nearest])
                if "masks" in one and "masks" in other:
                    self._differ("masks", np.abs(other["masks"][j] - one["masks"][i]).max())
            elif not score <= floor + tolerance["scores"]:  # NaN is over it
                self.detections += 1
                self.unmatched += 1

    def _differ(self, name: str, value: float) -> None:
        self.largest[name] = larger(self.largest.get(name, 0.0), value)


def larger(one: float, other: float) -> float:
    """NaN if either is, which is over every tolerance."""
    return float(np.maximum(one, other))


def _grouped(items: Iterable[T], key: Callable[[T], object], size: int) -> Iterator[list[T]]:
    """Items of one key, `size` at a time; the last of each key may be fewer."""
    waiting: dict[object, list[T]] = defaultdict(list)
    for item in items:
        name = key(item)
        waiting[name].append(item)
        if len(waiting[name]) == size:
            yield waiting.pop(name)
    yield from waiting.values()


def _batches(count: int, batch_sizes: Sequence[int]) -> Iterator[list[int]]:
    """All of `count` images in batches of each size; the last of each is filled up from the first image on."""
    for size in batch_sizes:
        for start in range(0, count, size):
            yield [i % count for i in range(start, start + size)]


def _accept(parity: Parity, onnx_model: OnnxModel) -> Parity:
    precision = onnx_model.metadata.precision
    if precision == "int8":
        return parity
    if parity.unmatched > UNMATCHED[precision] * parity.detections:
        raise InputError(
            f"the graph and PyTorch disagree: {parity.unmatched} of {parity.detections} detections are on one side "
            "alone; no artefact is written"
        )
    for name, value in parity.largest.items():
        if not value <= TOLERANCE[precision][name]:
            raise InputError(
                f"the graph and PyTorch disagree: {name} differ by {value:.3g}, over {TOLERANCE[precision][name]}; "
                "no artefact is written"
            )
    return parity
