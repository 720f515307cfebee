"""A checkpoint as a source of predictions: PyTorch, through the same loops as `backbones eval` and `detection eval`."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.checkpoint import pick_device
from backbones.cspnet import create_model
from backbones.engine import predict
from backbones.imagenet import ImageNet
from backbones.metrics import rank
from backbones.preprocess import DetectorPreprocess, decode
from backbones.samples import Sample
from backbones.schema import Device
from detection.coco import CocoSet, Record
from detection.engine import evaluate
from detection.images import EvaluationImages, create_loader
from detection.weights import load_detector
from serving.artifact import Artifact, ClassifierArtifact, DetectorArtifact
from serving.jobs.results import Row
from serving.predictor import Classification, Detections

BATCH_SIZE = 8


class CheckpointSource:
    """The weights that an artefact was exported from.

    Args:
        weights: a local file.
        metadata: of the artefact.
    """

    def __init__(self, weights: Path, metadata: Artifact, device: Device = "auto"):
        self.name, self.weights, self.metadata, self.device = "checkpoint", weights, metadata, pick_device(device)

    def rows(self, paths: Sequence[Path]) -> Iterator[Row]:
        """What became of each image, in the order of `paths`.

        Raises:
            InputError: an image that cannot be decoded.
        """
        if isinstance(self.metadata, ClassifierArtifact):
            return self._classify(paths, self.metadata)
        return self._detect(paths, self.metadata)

    def _classify(self, paths: Sequence[Path], metadata: ClassifierArtifact) -> Iterator[Row]:
        model = create_model(metadata.model, len(metadata.classes), self.weights).to(self.device)
        images = ImageNet([Sample(str(path), 0, path) for path in paths], metadata.preprocess)
        logits = predict(model, images, batch_size=BATCH_SIZE, workers=0, title=self.name).logits
        indices = rank(logits, len(metadata.classes))
        probabilities = np.take_along_axis(torch.from_numpy(logits).softmax(1).numpy(), indices, axis=1)
        for path, i, p in zip(paths, indices, probabilities, strict=True):
            yield Row(str(path), Classification(i, p))

    def _detect(self, paths: Sequence[Path], metadata: DetectorArtifact) -> Iterator[Row]:
        thresholds: dict[str, Any] = {
            name: getattr(metadata, name) for name in ("score_threshold", "nms_iou", "max_detections")
        }
        preprocess: DetectorPreprocess = metadata.preprocess
        model, _ = load_detector(self.weights, preprocess, **thresholds)
        nothing = np.empty((0, 4), np.float32), np.empty(0, np.int64)
        records = [Record(i, path, None, *nothing) for i, path in enumerate(paths)]
        images = EvaluationImages(CocoSet(records, metadata.category_ids, metadata.classes), preprocess)
        loader = create_loader(images, BATCH_SIZE, workers=0)
        found: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in evaluate(model.to(self.device), loader, metadata.category_ids, title=self.name):
            found[row["image_id"]].append(row)
        for i, path in enumerate(paths):
            yield Row(str(path), _detections(found[i], decode(path).size[::-1], metadata))


def _detections(rows: Sequence[dict[str, Any]], size: tuple[int, int], metadata: DetectorArtifact) -> Detections:
    """Detections from COCO's results format, in which boxes are x, y, width and height."""
    xywh = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    return Detections(
        boxes=np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1).astype(np.float32),
        scores=np.array([row["score"] for row in rows], np.float32),
        indices=np.array([metadata.category_ids.index(row["category_id"]) for row in rows], np.int64),
        size=size,
        masks=[row["segmentation"] for row in rows] if metadata.masks else None,
    )
