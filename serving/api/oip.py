"""Open Inference Protocol v2, whatever carries it: what a request asks for, tensors to images, results to tensors; no
Ray, no torch here.

https://github.com/kserve/open-inference-protocol; `oip_json` and `oip_grpc` are its two forms. Shapes: N images, k the
most results that one of them has.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

from backbones.errors import InputError, unknown
from serving.api.schemas import DEFAULT_TOP_K, class_indices, kept
from serving.artifact import Artifact, DetectorArtifact
from serving.predictor import Classification, Detections

INPUT = "images"
PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ["binary_tensor_data", "model_repository"]
MAX_IMAGES = 64  # of a request
Tensor: TypeAlias = npt.NDArray[Any]
Tensors: TypeAlias = Mapping[str, tuple[str, Tensor]]  # by name their datatypes and values
Images: TypeAlias = tuple[bytes | npt.NDArray[np.uint8], ...]  # each encoded, or uint8 [H, W, 3] in RGB


class Parameters(BaseModel, extra="forbid"):
    """Those of a request."""

    top_k: int | None = Field(default=None, ge=1, strict=True)
    score_threshold: float | None = Field(default=None, ge=0, le=1, strict=True)
    classes: str | None = None  # labels or indices to keep, comma-separated: the protocol's parameters are no lists


@dataclass(frozen=True)
class InferRequest:
    """What a request asks for.

    Attributes:
        outputs: the wanted tensors by name, each with whether it is to be bytes, after JSON.
        top_k: the most classes or detections of an image.
        classes: indices of those to keep; None keeps all.
    """

    id: str
    images: Images
    outputs: Mapping[str, bool]
    top_k: int | None
    score_threshold: float | None
    classes: tuple[int, ...] | None


def output_tensors(artifact: Artifact) -> dict[str, tuple[str, list[int]]]:
    """By name the datatype and the shape of what an inference answers; -1 is any size."""
    if isinstance(artifact, DetectorArtifact):
        return {
            "boxes": ("FP32", [-1, -1, 4]), "scores": ("FP32", [-1, -1]), "labels": ("BYTES", [-1, -1]),
            "category_ids": ("INT64", [-1, -1]), "num_detections": ("INT64", [-1]),
        }  # fmt: skip
    return {"scores": ("FP32", [-1, -1]), "indices": ("INT64", [-1, -1]), "labels": ("BYTES", [-1, -1])}


def check_input(names: Sequence[str]) -> None:
    """Raise `InputError` unless the inputs are the one that every model has."""
    if list(names) != [INPUT]:
        raise InputError(f"inputs are {', '.join(map(repr, names)) or 'none'}: give the one input {INPUT!r}")


def ask(
    id: str, images: Images, outputs: Mapping[str, bool], parameters: Parameters, artifact: Artifact
) -> InferRequest:
    """The request for these images.

    Raises:
        InputError: an output, a threshold or a class that the artefact does not have.
    """
    for name in outputs:
        if name not in output_tensors(artifact):
            raise unknown("output", name, output_tensors(artifact))
    _check_threshold(parameters.score_threshold, artifact)
    return InferRequest(
        id=id,
        images=images,
        outputs=outputs,
        top_k=parameters.top_k,
        score_threshold=parameters.score_threshold,
        classes=None if parameters.classes is None else class_indices(parameters.classes, artifact),
    )


def first_of(error: ValidationError, prefix: Sequence[str] = ()) -> str:
    """Where and what is wrong, in one line."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, (*prefix, *first['loc']))) or 'body'}: {first['msg']}"


def check_shape(datatype: str, shape: Sequence[int]) -> None:
    """Raise `InputError` unless the input is BYTES [N] or UINT8 [N, H, W, 3]."""
    if not shape or not 1 <= shape[0] <= MAX_IMAGES:
        raise InputError(f"input {INPUT!r} has shape {list(shape)}: give 1 to {MAX_IMAGES} images")
    if datatype == "BYTES":
        if tuple(shape[1:]) not in ((), (1,)):
            raise InputError(f"input {INPUT!r} has shape {list(shape)}: encoded images have [N]")
    elif datatype != "UINT8":
        raise InputError(f"input {INPUT!r} has datatype {datatype!r}: give BYTES (encoded images) or UINT8")
    elif len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise InputError(f"input {INPUT!r} has shape {list(shape)}: UINT8 images have [N, height, width, 3], in RGB")


def to_images(shape: Sequence[int], content: tuple[bytes, ...] | npt.NDArray[np.uint8]) -> Images:
    """A checked shape's elements or, of any shape, values as its images."""
    count, unit = (len(content), "elements") if isinstance(content, tuple) else (content.size, "values")
    if count != math.prod(shape):
        raise InputError(f"input {INPUT!r} has shape {list(shape)} and {count} {unit}")
    return content if isinstance(content, tuple) else tuple(content.reshape(shape))


def from_raw(datatype: str, shape: Sequence[int], raw: bytes) -> Images:
    """A tensor of a checked shape, as the protocol has its bytes."""
    return to_images(shape, _elements(raw) if datatype == "BYTES" else np.frombuffer(raw, np.uint8))


def to_tensors(request: InferRequest, artifact: Artifact, results: Sequence[Classification | Detections]) -> Tensors:
    """What was asked for; of detections, rows beyond an image's `num_detections` are zeros."""
    tensors = _pad([_choose(result, request, artifact) for result in results])
    return {name: (output_tensors(artifact)[name][0], tensors[name]) for name in request.outputs}


def to_bytes(values: Tensor) -> bytes:
    """A tensor's bytes; of BYTES, each element after its length as 4 bytes, the least first."""
    if values.dtype != object:
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    encoded = [label.encode() for label in values.ravel()]
    return b"".join(struct.pack("<I", len(label)) + label for label in encoded)


def _check_threshold(threshold: float | None, artifact: Artifact) -> None:
    if threshold is None:
        return
    if not isinstance(artifact, DetectorArtifact):
        raise InputError(f"score_threshold={threshold:g} is for detectors: leave it out")
    if threshold < artifact.score_threshold:
        least = artifact.score_threshold
        raise InputError(f"score_threshold={threshold:g} is below {least:g}, under which the artefact finds nothing")


def _elements(tail: bytes) -> tuple[bytes, ...]:
    """A BYTES tensor's: each after its length as 4 bytes, the least first."""
    elements: list[bytes] = []
    at = 0
    while at < len(tail):
        end = at + 4 + int.from_bytes(tail[at : at + 4], "little")
        if end > len(tail) or at + 4 > len(tail):
            raise InputError(f"element {len(elements)} of input {INPUT!r} goes beyond the tensor's end")
        elements.append(tail[at + 4 : end])
        at = end
    return tuple(elements)


def _choose(result: Classification | Detections, request: InferRequest, artifact: Artifact) -> dict[str, Tensor]:
    """An image's tensors: what the request keeps of its result."""
    scores = result.probabilities if isinstance(result, Classification) else result.scores
    top_k = request.top_k or (DEFAULT_TOP_K if isinstance(result, Classification) else None)
    best = kept(result.indices, scores, top_k, request.score_threshold, request.classes)
    indices = result.indices[best]
    tensors: dict[str, Tensor] = {
        "scores": scores[best],
        "labels": np.array([artifact.classes[i] for i in indices], object),
    }
    if isinstance(result, Classification):
        return tensors | {"indices": indices}
    assert isinstance(artifact, DetectorArtifact)
    return tensors | {
        "boxes": result.boxes[best],
        "category_ids": np.array([artifact.category_ids[i] for i in indices], np.int64),
        "num_detections": np.array(len(best), np.int64),
    }


def _pad(chosen: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The images' tensors as one each, [N, k, ...]."""
    k = max(len(tensors["scores"]) for tensors in chosen)

    def padded(values: Tensor) -> Tensor:
        if not values.ndim:
            return values
        filled = np.full((k, *values.shape[1:]), "" if values.dtype == object else 0, values.dtype)
        filled[: len(values)] = values
        return filled

    return {name: np.stack([padded(tensors[name]) for tensors in chosen]) for name in chosen[0]}
