"""One known image, and whether an artefact still answers it as it did when it was made; no torch here.

Of the answer a part is kept in the artefact: a broken file, driver or kernel, or another network under its name, is off
by far more than the providers' rounding, so tolerances are wide.

Shapes: C classes, K detections.
"""

from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from backbones.errors import InputError
from backbones.preprocess import Pixels
from serving.artifact import SelfTest
from serving.predictor import Classifier, Detections, create_predictor
from serving.runtime import OnnxModel

HEIGHT, WIDTH, DISCS = 240, 320, 8
IMAGES = 4  # to choose from: where a detector is surest
KEPT = 8  # classes or detections
DIGITS = 6  # significant ones of what is kept


class Tolerance(NamedTuple):
    values: float  # logits in units of their spread, or scores
    boxes: float  # pixels of the known image
    unmatched: float  # share of detections: where two overlap and score alike, rounding decides which NMS keeps


TOLERANCE = {
    "fp32": Tolerance(0.01, 1, 0.25),
    "fp16": Tolerance(0.05, 8, 0.25),  # the CPU computes in float
    "int8": Tolerance(0.15, 16, 0.5),  # without VNNI, sums of products may saturate
}


def known_image(number: int) -> Pixels:
    """uint8 [240, 320, 3], the same bits everywhere: gradients and discs, of integers alone."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 1), (x + y) % 256], axis=-1)
    for disc in range(number * DISCS + 1, (number + 1) * DISCS + 1):
        column, row, radius = disc * 7919 % WIDTH, disc * 104729 % HEIGHT, 8 + disc * 31 % 40
        inside = (x - column) ** 2 + (y - row) ** 2 < radius**2
        image[inside] = disc * 97 % 256, disc * 193 % 256, disc * 59 % 256
    return image.astype(np.uint8)


def record(model: OnnxModel) -> SelfTest:
    """The answer to a known image, for the artefact to keep."""
    predictor = create_predictor(model)
    if isinstance(predictor, Classifier):
        logits = _logits(model, predictor)
        best = np.argsort(-logits, kind="stable")[:KEPT]
        return SelfTest(image=0, indices=best.tolist(), values=_rounded(logits[best]))
    answers = [_detections(predictor, number) for number in range(IMAGES)]
    image = max(range(IMAGES), key=lambda number: answers[number].scores.max(initial=0))
    found = answers[image]
    return SelfTest(
        image=image,
        indices=found.indices[:KEPT].tolist(),
        values=_rounded(found.scores[:KEPT]),
        boxes=tuple(_rounded(box) for box in found.boxes[:KEPT]),
    )


def check(model: OnnxModel) -> None:
    """Hold a model to what its artefact keeps; of an artefact that keeps nothing, nothing is asked.

    Raises:
        InputError: it answers something else, beyond its precision's tolerance.
    """
    expected = model.metadata.self_test
    if expected is None:
        return
    tolerance = TOLERANCE[model.metadata.precision]
    predictor = create_predictor(model)
    if isinstance(predictor, Classifier):
        problem = _compare_logits(_logits(model, predictor), expected, tolerance)
    else:
        threshold = predictor.metadata.score_threshold
        problem = _compare_detections(_detections(predictor, expected.image), expected, tolerance, threshold)
    if problem:
        raise InputError(
            f"{model.path} fails its self-test on {model.provider}: {problem}; export it again, or use another provider"
        )


def _logits(model: OnnxModel, predictor: Classifier) -> npt.NDArray[np.float32]:
    """[C], of known image 0."""
    outputs = model.run(**predictor.inputs([predictor.prepare(known_image(0))]))
    return cast(npt.NDArray[np.float32], outputs["logits"][0])


def _detections(predictor: Any, number: int) -> Detections:
    return cast(Detections, predictor.predict([predictor.prepare(known_image(number))])[0])


def _compare_logits(logits: npt.NDArray[np.float32], expected: SelfTest, tolerance: Tolerance) -> str:
    spread = max(float(np.ptp(logits)), float(np.finfo(np.float32).tiny))
    off = float(np.abs(logits[list(expected.indices)] - np.array(expected.values, np.float32)).max()) / spread
    if off <= tolerance.values:  # NaN is over it
        return ""
    return f"logits differ by {off:.3g} of their spread, over {tolerance.values:g}"


def _compare_detections(found: Detections, expected: SelfTest, tolerance: Tolerance, threshold: float) -> str:
    """Each of the kept detections, whatever their order, needs a partner of its class near by."""
    if not expected.indices:
        best = float(found.scores.max(initial=0))
        return f"a score of {best:.3g} where nothing was" if not best <= threshold + tolerance.values else ""
    unmatched, farthest = 0, 0.0
    for label, score, box in zip(expected.indices, expected.values, expected.boxes, strict=True):
        same = found.indices == label
        boxes_off = np.abs(found.boxes[same] - np.array(box, np.float32)).max(axis=1, initial=0)
        scores_off = np.abs(found.scores[same] - np.float32(score))
        off = np.maximum(boxes_off / tolerance.boxes, scores_off / tolerance.values).min(initial=np.inf)
        if not off <= 1 and score > threshold + tolerance.values:
            unmatched, farthest = unmatched + 1, max(farthest, float(off))
    if unmatched <= tolerance.unmatched * len(expected.indices):
        return ""
    return (
        f"{unmatched} of {len(expected.indices)} detections are not found again within {tolerance.values:g} of the "
        f"score and {tolerance.boxes:g} px, and the farthest is {farthest:.3g} times that off"
    )


def _rounded(values: npt.NDArray[np.float32]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)
