"""How far an artefact is from PyTorch, measured on pictures; export refuses what is too far.

Shapes: N images, C classes, K detections of an image.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from backbones.cspnet import CSPNet
from backbones.engine import normalize
from backbones.errors import InputError
from backbones.files import list_images
from backbones.preprocess import canvas_size, classifier_pixels, decode, detector_pixels
from detection.families import Detector
from detection.images import to_image
from serving.artifact import ClassifierArtifact, DetectorArtifact, Parity
from serving.predictor import Detections, detections
from serving.predictor import Detector as DetectorPredictor
from serving.runtime import OnnxModel
from serving.shapes import CLASSES, background, draw_shape

BATCH_SIZES = (1, 3)
# What float32 may differ by: logits in units of their spread, scores, pixels of the original image.
TOLERANCE = {"logits": 1e-4, "probabilities": 1e-4, "scores": 1e-3, "boxes": 0.05}
NEAR = 1.0  # pixels; further apart they are two detections
UNMATCHED = 0.01  # share of detections; of two that overlap and score alike, rounding decides which NMS keeps


def pictures(folder: str | Path | None, width: int, height: int) -> list[Image.Image]:
    """One picture for each place in the batches: from a folder, or drawn, of `width` x `height` pixels.

    Raises:
        InputError: the folder has too few.
    """
    count = sum(BATCH_SIZES)
    if folder is not None:
        paths = list_images(Path(folder))[:count]
        if len(paths) < count:
            raise InputError(f"--images {folder} has {len(paths)} images: give a folder with at least {count}")
        return [decode(path) for path in paths]
    return [_drawn(seed, width, height) for seed in range(count)]


def _drawn(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = background(rng, width, height)
    for name in CLASSES:
        x, y = rng.uniform(0.2, 0.8, 2) * (width, height)
        draw_shape(rng, image, name, rng.uniform(0.08, 0.2) * min(width, height), x, y)
    return image


def _batches(images: Sequence[Image.Image]) -> list[list[Image.Image]]:
    rest = iter(images)
    return [list(islice(rest, size)) for size in BATCH_SIZES]


@torch.inference_mode()
def compare_classifier(model: CSPNet, onnx_model: OnnxModel, images: Sequence[Image.Image]) -> Parity:
    """Largest differences of logits (in units of their spread) and probabilities.

    Raises:
        InputError: one is over its tolerance.
    """
    assert isinstance(onnx_model.metadata, ClassifierArtifact)
    preprocess = onnx_model.metadata.preprocess
    largest = {"logits": 0.0, "probabilities": 0.0}
    for batch in _batches(images):
        pixels = np.stack([classifier_pixels(image, preprocess) for image in batch])
        expected = model(normalize(torch.from_numpy(pixels), preprocess))
        outputs = onnx_model.run(images=pixels)
        spread = float(expected.max() - expected.min())
        off = {
            "logits": np.abs(outputs["logits"] - expected.numpy()).max() / spread,
            "probabilities": np.abs(outputs["probabilities"] - expected.softmax(1).numpy()).max(),
        }
        largest = {name: max(value, float(off[name])) for name, value in largest.items()}
    return _accept(Parity(batch_sizes=BATCH_SIZES, images=len(images), largest=largest))


@torch.inference_mode()
def compare_detector(model: Detector, onnx_model: OnnxModel, images: Sequence[Image.Image]) -> Parity:
    """Largest differences of matched detections' scores and boxes from torchvision's own, image by image.

    A detection near the score threshold, or near the score of the last one kept, may be on one side alone.

    Raises:
        InputError: a difference is over its tolerance, or more than a few detections have no match.
    """
    assert isinstance(onnx_model.metadata, DetectorArtifact)
    predictor = DetectorPredictor(onnx_model, onnx_model.metadata)
    fitted = [detector_pixels(image, onnx_model.metadata.preprocess) for image in images]
    divisor = onnx_model.metadata.preprocess.divisor
    fellows = [item for item in fitted if canvas_size(item.pixels, divisor) == canvas_size(fitted[0].pixels, divisor)]
    together = [fellows[i % len(fellows)] for i in range(max(BATCH_SIZES))]  # images of one canvas run as one batch
    pairs: list[tuple[float, float]] = []
    unmatched = 0
    for batch in (together, *([item] for item in fitted)):
        for item, found in zip(batch, predictor.predict(batch), strict=True):
            output = model([to_image(torch.from_numpy(item.pixels.copy()))])[0]
            expected = detections(output["boxes"].numpy(), output["scores"].numpy(), output["labels"].numpy(), item)
            for one, other in ((expected, found), (found, expected)):
                matched, lost = _match(one, other, onnx_model.metadata)
                pairs += matched
                unmatched += lost
    largest = {name: max((pair[i] for pair in pairs), default=0.0) for i, name in enumerate(("scores", "boxes"))}
    total = len(pairs) + unmatched
    if unmatched > UNMATCHED * total:
        raise InputError(
            f"the graph and PyTorch disagree: {unmatched} of {total} detections are on one side alone; "
            "no artefact is written"
        )
    measured = {"batch_sizes": BATCH_SIZES, "images": len(images), "detections": total, "unmatched": unmatched}
    return _accept(Parity.model_validate(measured | {"largest": largest}))


def _match(one: Detections, other: Detections, artifact: DetectorArtifact) -> tuple[list[tuple[float, float]], int]:
    """For each detection of `one` its nearest in `other`: the differences of score and box; and how many have none."""
    floor = artifact.score_threshold
    if len(one.scores) == artifact.max_detections:
        floor = max(floor, float(one.scores[-1]))
    pairs, lost = [], 0
    for box, score, index in zip(one.boxes, one.scores, one.indices, strict=True):
        same: npt.NDArray[np.bool_] = (other.indices == index) & (np.abs(other.scores - score) <= TOLERANCE["scores"])
        off = np.abs(other.boxes[same] - box).max(1)
        if len(off) and off.min() < NEAR:
            nearest = int(off.argmin())
            pairs.append((float(abs(other.scores[same][nearest] - score)), float(off[nearest])))
        else:
            lost += bool(score > floor + TOLERANCE["scores"])
    return pairs, lost


def _accept(parity: Parity) -> Parity:
    for name, value in parity.largest.items():
        if not value <= TOLERANCE[name]:
            raise InputError(
                f"the graph and PyTorch disagree: {name} differ by {value:.3g}, over {TOLERANCE[name]}; "
                "no artefact is written"
            )
    return parity
