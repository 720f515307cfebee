"""Open Inference Protocol v2 over HTTP: the bytes of an inference request to images, results to bytes; no Ray, no torch
here.

JSON, with the binary tensor data extension of Triton's, in which tensors' bytes follow the JSON.
"""

import base64
import json
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, JsonValue, ValidationError

from backbones.errors import InputError
from serving.api import oip
from serving.api.oip import INPUT
from serving.artifact import Artifact

JSON_LENGTH = "Inference-Header-Content-Length"  # the header with the JSON's length, in bytes, where tensors follow it
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


class RequestParameters(oip.Parameters):
    binary_data_output: bool = Field(default=False, strict=True)


class Request(BaseModel):
    id: str = ""
    parameters: RequestParameters = RequestParameters()
    inputs: tuple[InputTensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()


class IndexRequest(BaseModel):
    ready: bool = Field(default=False, strict=True)  # those models alone


def parse_index(body: bytes) -> IndexRequest:
    """What `POST /v2/repository/index` asks for; a body is not needed.

    Raises:
        InputError: it is no such request.
    """
    try:
        return IndexRequest.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise InputError(f'{oip.first_of(error)}; send no body, or {{"ready": true}}') from None


def parse(body: bytes, json_length: str | None, artifact: Artifact) -> oip.InferRequest:
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
        raise InputError(f"{oip.first_of(error)}; a request is such as {_EXAMPLE}") from None
    oip.check_input([given.name for given in request.inputs])
    asked = request.parameters
    outputs = {output.name: output.parameters.binary_data for output in request.outputs}
    return oip.ask(
        id=request.id,
        images=_images(request.inputs[0], tail),
        outputs={
            name: asked.binary_data_output if binary is None else binary
            for name, binary in (outputs or dict.fromkeys(oip.output_tensors(artifact))).items()
        },
        parameters=asked,
        artifact=artifact,
    )


def render(request: oip.InferRequest, model: str, version: str, tensors: oip.Tensors) -> tuple[bytes, dict[str, str]]:
    """The body of an answer and its headers."""
    outputs, tail = [], bytearray()
    for name, (datatype, values) in tensors.items():
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if request.outputs[name]:
            content = oip.to_bytes(values)
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
    digits = len(json_length) < 20 and json_length.isascii() and json_length.isdigit()
    if not (digits and int(json_length) <= len(body)):
        raise InputError(f"{JSON_LENGTH} is {json_length[:20]!r}: give the bytes of JSON in the body of {len(body)}")
    return body[: int(json_length)], body[int(json_length) :]


def _images(given: InputTensor, tail: bytes) -> oip.Images:
    size = given.parameters.binary_data_size
    if (given.data is None) == (size is None):
        raise InputError(f"input {INPUT!r} needs either data or the parameter binary_data_size")
    if len(tail) != (size or 0):
        raise InputError(f"{len(tail)} bytes follow the JSON, and binary_data_size is {size or 0}")
    oip.check_shape(given.datatype, given.shape)
    if size is not None:
        return oip.from_raw(given.datatype, given.shape, tail)
    return oip.to_images(
        given.shape, _from_base64(given.data) if given.datatype == "BYTES" else _from_numbers(given.data)
    )


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
