"""Open Inference Protocol v2: the bytes of an inference request to images, results to bytes; no Ray, no torch here.

https://github.com/kserve/open-inference-protocol, with the binary tensor data extension of Triton's, in which tensors'
bytes follow the JSON. Shapes: N images, k the most results that one of them has.
"""

import base64
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, JsonValue, ValidationError

from backbones.errors import InputError, unknown
from serving.artifact import Artifact, DetectorArtifact
from serving.predictor import Classification, Detections
from serving.schemas import DEFAULT_TOP_K, class_indices, kept

JSON_LENGTH = "Inference-Header-Content-Length"  # the header with the JSON's length, in bytes, where tensors follow it
INPUT = "images"
MAX_IMAGES = 64  # of a request
Tensor: TypeAlias = npt.NDArray[Any]
_EXAMPLE = '{"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": ["<base64 of a JPEG>"]}]}'


class TensorParameters(BaseModel):
    binary_data_size: int | None = Field(default=None, ge=0, strict=True)  # bytes of it after the JSON


class InputTensor(BaseModel):
    name: str
    datatype: str
    shape: tuple[int, ...] = Field(max_length=8)
    parameters: TensorParameters = TensorParameters()
    data: JsonValue = None


class OutputParameters(BaseModel):
    binary_data: bool | None = Field(default=None, strict=True)


class RequestedOutput(BaseModel):
    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(BaseModel, extra="forbid"):
    binary_data_output: bool = Field(default=False, strict=True)
    top_k: int | None = Field(default=None, ge=1, strict=True)
    score_threshold: float | None = Field(default=None, ge=0, le=1, strict=True)
    classes: str | None = None  # labels or indices to keep, comma-separated: the protocol's parameters are no lists


class Request(BaseModel):
    id: str = ""
    parameters: RequestParameters = RequestParameters()
    inputs: tuple[InputTensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()


@dataclass(frozen=True)
class InferRequest:
    """What a request asks for.

    Attributes:
        images: each encoded, or uint8 [H, W, 3] in RGB.
        outputs: the wanted tensors by name, each with whether it is to be bytes after the JSON.
        top_k: the most classes or detections of an image.
        classes: indices of those to keep; None keeps all.
    """

    id: str
    images: tuple[bytes | npt.NDArray[np.uint8], ...]
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


def parse(body: bytes, json_length: str | None, artifact: Artifact) -> InferRequest:
    """An inference request.

    Args:
        json_length: what the header `JSON_LENGTH` says, where it is given.

    Raises:
        InputError: naming what is wrong with it, and what is right.
    """
    text, tail = _split(body, json_length)
    try:
        request = Request.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise InputError(f"{where}: {first['msg']}; a request is such as {_EXAMPLE}") from None
    if [given.name for given in request.inputs] != [INPUT]:
        names = ", ".join(repr(given.name) for given in request.inputs) or "none"
        raise InputError(f"inputs are {names}: give the one input {INPUT!r}")
    asked, tensors = request.parameters, output_tensors(artifact)
    outputs = {output.name: output.parameters.binary_data for output in request.outputs} or dict.fromkeys(tensors)
    for name in outputs:
        if name not in tensors:
            raise unknown("output", name, tensors)
    _check_threshold(asked.score_threshold, artifact)
    return InferRequest(
        id=request.id,
        images=_images(request.inputs[0], tail),
        outputs={name: asked.binary_data_output if binary is None else binary for name, binary in outputs.items()},
        top_k=asked.top_k,
        score_threshold=asked.score_threshold,
        classes=None if asked.classes is None else class_indices(asked.classes, artifact),
    )


def render(
    request: InferRequest,
    model: str,
    version: str,
    artifact: Artifact,
    results: Sequence[Classification | Detections],
) -> tuple[bytes, dict[str, str]]:
    """The body of an answer and its headers; of detections, rows beyond an image's `num_detections` are zeros."""
    chosen = [_choose(result, request, artifact) for result in results]
    tensors = _pad(chosen)
    outputs, tail = [], bytearray()
    for name, binary in request.outputs.items():
        datatype, values = output_tensors(artifact)[name][0], tensors[name]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if binary:
            content = _to_bytes(values)
            tail += content
            output["parameters"] = {"binary_data_size": len(content)}
        else:
            output["data"] = values.ravel().tolist()
        outputs.append(output)
    answer = {"model_name": model, "model_version": version} | ({"id": request.id} if request.id else {})
    text = json.dumps(answer | {"outputs": outputs}).encode()
    if not any(request.outputs.values()):
        return text, {"content-type": "application/json"}
    return text + bytes(tail), {"content-type": "application/octet-stream", JSON_LENGTH: str(len(text))}


def _split(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    if json_length is None:
        return body, b""
    if not (json_length.isascii() and json_length.isdigit() and int(json_length) <= len(body)):
        raise InputError(f"{JSON_LENGTH} is {json_length!r}: give the bytes of JSON in the body of {len(body)}")
    return body[: int(json_length)], body[int(json_length) :]


def _check_threshold(threshold: float | None, artifact: Artifact) -> None:
    if threshold is None:
        return
    if not isinstance(artifact, DetectorArtifact):
        raise InputError(f"score_threshold={threshold:g} is for detectors: leave it out")
    if threshold < artifact.score_threshold:
        least = artifact.score_threshold
        raise InputError(f"score_threshold={threshold:g} is below {least:g}, under which the artefact finds nothing")


def _images(given: InputTensor, tail: bytes) -> tuple[bytes | npt.NDArray[np.uint8], ...]:
    size, shape = given.parameters.binary_data_size, given.shape
    if (given.data is None) == (size is None):
        raise InputError(f"input {INPUT!r} needs either data or the parameter binary_data_size")
    if len(tail) != (size or 0):
        raise InputError(f"{len(tail)} bytes follow the JSON, and binary_data_size is {size or 0}")
    if not shape or not 1 <= shape[0] <= MAX_IMAGES:
        raise InputError(f"input {INPUT!r} has shape {list(shape)}: give 1 to {MAX_IMAGES} images")
    if given.datatype == "BYTES":
        if shape[1:] not in ((), (1,)):
            raise InputError(f"input {INPUT!r} has shape {list(shape)}: encoded images have [N]")
        images = _elements(tail) if size is not None else _from_base64(given.data)
        if len(images) != shape[0]:
            raise InputError(f"input {INPUT!r} has shape {list(shape)} and {len(images)} elements")
        return images
    if given.datatype != "UINT8":
        raise InputError(f"input {INPUT!r} has datatype {given.datatype!r}: give BYTES (encoded images) or UINT8")
    if len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise InputError(f"input {INPUT!r} has shape {list(shape)}: UINT8 images have [N, height, width, 3], in RGB")
    pixels = np.frombuffer(tail, np.uint8) if size is not None else _from_numbers(given.data)
    if pixels.size != math.prod(shape):
        raise InputError(f"input {INPUT!r} has shape {list(shape)} and {pixels.size} values")
    return tuple(pixels.reshape(shape))


def _elements(tail: bytes) -> tuple[bytes, ...]:
    """A BYTES tensor's: each after its length as 4 bytes, the least first."""
    elements: list[bytes] = []
    at = 0
    while at < len(tail):
        end = at + 4 + int.from_bytes(tail[at : at + 4], "little")
        if end > len(tail) or at + 4 > len(tail):
            raise InputError(f"element {len(elements)} of input {INPUT!r} goes beyond the body's end")
        elements.append(tail[at + 4 : end])
        at = end
    return tuple(elements)


def _from_base64(data: JsonValue) -> tuple[bytes, ...]:
    elements = []
    for element in data if isinstance(data, list) else [data]:
        text = element[0] if isinstance(element, list) and len(element) == 1 else element
        if not isinstance(text, str):
            raise InputError(f"input {INPUT!r} holds {type(text).__name__}: BYTES in JSON are strings of base64")
        try:
            elements.append(base64.b64decode(text, validate=True))
        except ValueError as error:
            raise InputError(f"element {len(elements)} of input {INPUT!r} is no base64 ({error})") from None
    return tuple(elements)


def _from_numbers(data: JsonValue) -> npt.NDArray[np.uint8]:
    try:
        values = np.asarray(data)
    except ValueError:  # rows of several lengths
        values = np.empty(0, object)
    if values.dtype.kind != "i" or values.min(initial=0) < 0 or values.max(initial=0) > 255:
        raise InputError(f"input {INPUT!r} holds something else than integers from 0 to 255, in rows of one length")
    return values.astype(np.uint8)


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


def _to_bytes(values: Tensor) -> bytes:
    if values.dtype != object:
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    encoded = [label.encode() for label in values.ravel()]
    return b"".join(struct.pack("<I", len(label)) + label for label in encoded)
