"""What the endpoints answer, as JSON; no torch here."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from typing_extensions import NotRequired, TypedDict

from backbones.errors import unknown
from detection.masks import RunLengths
from serving.artifact import Artifact, DetectorArtifact
from serving.predictor import Classification, Detections

DEFAULT_TOP_K = 5  # classes of an answer
MAX_TOP_K = 100_000
PICTURES = ("png", "jpeg")  # formats of `annotate`


class ClassScore(TypedDict):
    label: str
    index: int
    score: float


class ClassifyAnswer(TypedDict):
    """The best classes, best first; `score` is the probability."""

    model: str
    predictions: list[ClassScore]


class Box(TypedDict):
    """A detection; `segmentation` is its mask, of a model that finds masks, in the image's size."""

    label: str
    category_id: int
    score: float
    box: list[float]
    segmentation: NotRequired[RunLengths]


class DetectAnswer(TypedDict):
    """Detections, best first; `box` is x1, y1, x2, y2 in pixels of the upright original of `width` x `height`.

    `classification` is the answer of a classifier that was asked about the same picture.
    """

    model: str
    width: int
    height: int
    detections: list[Box]
    classification: NotRequired[ClassifyAnswer]


def class_indices(text: str, artifact: Artifact) -> tuple[int, ...]:
    """Labels or indices, comma-separated, as indices into the artefact's classes.

    Raises:
        InputError: no such class.
    """
    found = []
    for part in map(str.strip, text.split(",")):
        if part in artifact.classes:
            found.append(artifact.classes.index(part))
        elif len(part) < 10 and part.isdecimal() and int(part) < len(artifact.classes):
            found.append(int(part))
        else:
            raise unknown("class", part, artifact.classes)
    return tuple(found)


def kept(
    indices: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    top_k: int | None = None,
    score_threshold: float | None = None,
    classes: Sequence[int] | None = None,
) -> npt.NDArray[np.intp]:
    """Positions of the classes or detections that an answer keeps, best first as they are given.

    Args:
        score_threshold: compared exactly, a float32's value with a float64's.
        classes: indices of those to keep; None keeps all.
    """
    wanted = np.ones(len(scores), bool)
    if classes is not None:
        wanted &= np.isin(indices, classes)
    if score_threshold is not None:
        wanted &= scores.astype(np.float64) >= score_threshold
    return np.flatnonzero(wanted)[:top_k]


def classify_answer(
    artifact: Artifact, result: Classification, top_k: int = DEFAULT_TOP_K, classes: Sequence[int] | None = None
) -> ClassifyAnswer:
    """Floats are exact: a float32's value as JSON reads back as the same float32.

    Args:
        classes: indices of those to keep; None keeps all.
    """
    best = kept(result.indices, result.probabilities, top_k, classes=classes)
    rows = zip(result.indices[best].tolist(), result.probabilities[best].tolist(), strict=True)
    predictions: list[ClassScore] = [{"label": artifact.classes[i], "index": i, "score": p} for i, p in rows]
    return {"model": artifact.model, "predictions": predictions}


def detect_answer(
    artifact: DetectorArtifact,
    result: Detections,
    score_threshold: float | None = None,
    classes: Sequence[int] | None = None,
) -> DetectAnswer:
    """Floats are exact: a float32's value as JSON reads back as the same float32.

    Args:
        score_threshold: leave out what scores less; None keeps all that the artefact returned.
        classes: indices of those to keep; None keeps all.
    """
    best = kept(result.indices, result.scores, score_threshold=score_threshold, classes=classes)
    rows = (values[best].tolist() for values in (result.indices, result.scores, result.boxes))
    detections: list[Box] = []
    for k, i, score, box in zip(best.tolist(), *rows, strict=True):
        found: Box = {
            "label": artifact.classes[i], "category_id": artifact.category_ids[i], "score": score, "box": box
        }  # fmt: skip
        if result.masks is not None:
            found["segmentation"] = result.masks[k]
        detections.append(found)
    return {"model": artifact.model, "height": result.size[0], "width": result.size[1], "detections": detections}


def parse_classify(answer: ClassifyAnswer) -> Classification:
    """The inverse of `classify_answer`, for as many classes as the answer has."""
    best = answer["predictions"]
    return Classification(
        indices=np.array([entry["index"] for entry in best], np.int64),
        probabilities=np.array([entry["score"] for entry in best], np.float32),
    )


def parse_detect(answer: DetectAnswer, artifact: DetectorArtifact) -> Detections:
    """The inverse of `detect_answer`."""
    found = answer["detections"]
    return Detections(
        boxes=np.array([entry["box"] for entry in found], np.float32).reshape(-1, 4),
        scores=np.array([entry["score"] for entry in found], np.float32),
        indices=np.array([artifact.category_ids.index(entry["category_id"]) for entry in found], np.int64),
        size=(answer["height"], answer["width"]),
        masks=[entry["segmentation"] for entry in found] if artifact.masks else None,
    )
