"""What the endpoints answer, as JSON; no torch here."""

from collections.abc import Container
from itertools import islice

import numpy as np
from typing_extensions import NotRequired, TypedDict

from detection.masks import RunLengths
from serving.artifact import Artifact, DetectorArtifact
from serving.predictor import Classification, Detections


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
    """Detections, best first; `box` is x1, y1, x2, y2 in pixels of the upright original of `width` x `height`."""

    model: str
    width: int
    height: int
    detections: list[Box]


def classify_answer(
    artifact: Artifact, result: Classification, top_k: int = 5, classes: Container[int] | None = None
) -> ClassifyAnswer:
    """Floats are exact: a float32's value as JSON reads back as the same float32.

    Args:
        classes: indices of those to keep; None keeps all.
    """
    ranked = zip(result.indices.tolist(), result.probabilities.tolist(), strict=True)
    best = islice(((i, p) for i, p in ranked if classes is None or i in classes), top_k)
    predictions: list[ClassScore] = [{"label": artifact.classes[i], "index": i, "score": p} for i, p in best]
    return {"model": artifact.model, "predictions": predictions}


def detect_answer(
    artifact: DetectorArtifact,
    result: Detections,
    score_threshold: float | None = None,
    classes: Container[int] | None = None,
) -> DetectAnswer:
    """Floats are exact: a float32's value as JSON reads back as the same float32.

    Args:
        score_threshold: leave out what scores less; None keeps all that the artefact returned.
        classes: indices of those to keep; None keeps all.
    """
    rows = zip(result.indices.tolist(), result.scores.tolist(), result.boxes.tolist(), strict=True)
    detections: list[Box] = []
    for k, (i, score, box) in enumerate(rows):
        if score_threshold is not None and score < score_threshold:
            continue
        if classes is not None and i not in classes:
            continue
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
