"""What an artefact says about itself: JSON in the ONNX file's metadata, written by export and read by everyone;
no torch here.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from backbones.errors import InputError
from backbones.preprocess import ClassifierPreprocess, DetectorPreprocess
from backbones.schema import Section

SCHEMA_VERSION = 1  # what `_Artifact.schema_version` says
KEY = "cspnet"


class Parity(Section):
    """The largest differences from PyTorch that export measured, over the batch sizes it tried."""

    batch_sizes: tuple[int, ...] = ()
    images: int = 0
    detections: int = 0  # compared, those of PyTorch and of the graph, over all batches
    unmatched: int = 0  # among them: where two overlap and score alike, either may win
    largest: dict[str, float] = Field(
        default_factory=dict
    )  # by output: logits in units of their spread, scores, boxes in pixels


class _Artifact(Section):
    schema_version: Literal[1] = 1
    model: str
    classes: tuple[str, ...]
    weights_sha256: str
    config: dict[str, Any]  # of the training run; empty if the weights do not know it
    versions: dict[str, str]
    parity: Parity


class ClassifierArtifact(_Artifact):
    """uint8 `images` [N, H, W, 3] -> `logits` [N, C], `probabilities` [N, C]."""

    task: Literal["classification"] = "classification"
    preprocess: ClassifierPreprocess


class DetectorArtifact(_Artifact):
    """uint8 `images` [N, H, W, 3], int64 `sizes` [N, 2] -> `boxes` [N, K, 4], `scores` [N, K], `labels` [N, K],
    `num_detections` [N]; label i is `classes[i - 1]` and COCO category `category_ids[i - 1]`.
    """

    task: Literal["detection"] = "detection"
    preprocess: DetectorPreprocess
    category_ids: tuple[int, ...]
    score_threshold: float
    nms_iou: float
    max_detections: int


Artifact = ClassifierArtifact | DetectorArtifact
_ADAPTER: TypeAdapter[Artifact] = TypeAdapter(Annotated[Artifact, Field(discriminator="task")])


def to_metadata(artifact: Artifact) -> dict[str, str]:
    """The entries of ONNX's `metadata_props`."""
    return {KEY: artifact.model_dump_json()}


def from_metadata(metadata: Mapping[str, str], path: object) -> Artifact:
    """The inverse of `to_metadata`; `path` is for the message.

    Raises:
        InputError: not exported by this project, or by a newer version of it.
    """
    if KEY not in metadata:
        raise InputError(f"{path} carries no cspnet metadata: export it with `python -m serving export`")
    try:
        values = json.loads(metadata[KEY])
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{path} has metadata version {version}, not {SCHEMA_VERSION}: update cspnet or export again"
            )
        return _ADAPTER.validate_python(values)
    except (ValidationError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has broken metadata ({str(error).splitlines()[0]}): export it again") from None
