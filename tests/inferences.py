"""What the two forms of the Open Inference Protocol are asked and have to answer."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from artifacts import write_classifier, write_detector

from serving.artifact import Artifact, read_artifact
from serving.predictor import Classification, Detections

JPEG = b"\xff\xd8 not decoded here"
PIXELS = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
CLASSES = Classification(np.array([2, 0, 1]), np.array([0.7, 0.2, 0.1], np.float32))
FOUND = Detections(
    boxes=np.array([[1, 2, 3, 4], [5, 6, 7, 8.5]], np.float32), scores=np.array([0.9, 0.6], np.float32),
    indices=np.array([1, 0]), size=(40, 60),
)  # fmt: skip
NONE = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), (40, 60))


def _artifact(write: Callable[[Path], Path]) -> Artifact:
    with TemporaryDirectory() as folder:
        return read_artifact(write(Path(folder) / "m.onnx"))[0]


CLASSIFIER, DETECTOR = _artifact(write_classifier), _artifact(write_detector)
