"""Open Inference Protocol v2 over gRPC: its messages, inference requests to images and results to answers; no Ray, no
torch here.

The messages are made here and not by protoc: generated code goes with one version of protobuf, and would clash with
that of any client in the process, such as tritonclient's, which has the same names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from backbones.errors import InputError
from serving.api import oip
from serving.artifact import Artifact

PACKAGE, SERVICE = "inference", "GRPCInferenceService"
_BOOL, _INT32, _INT64, _UINT32, _UINT64, _DOUBLE, _STRING, _BYTES = (
    getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name}")
    for name in ("BOOL", "INT32", "INT64", "UINT32", "UINT64", "DOUBLE", "STRING", "BYTES")
)
# By name of a message its fields, each with number and type, a type in a list being repeated; what is not here is
# ignored. A map is, in bytes, a list of its entries.
_MESSAGES: dict[str, dict[str, tuple[int, Any]]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, _BOOL)},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, _BOOL)},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {"name": (1, _STRING), "version": (2, _STRING), "extensions": (3, [_STRING])},
    "ModelReadyRequest": {"name": (1, _STRING), "version": (2, _STRING)},
    "ModelReadyResponse": {"ready": (1, _BOOL)},
    "ModelMetadataRequest": {"name": (1, _STRING), "version": (2, _STRING)},
    "ModelMetadataResponse": {
        "name": (1, _STRING),
        "versions": (2, [_STRING]),
        "platform": (3, _STRING),
        "inputs": (4, ["TensorMetadata"]),
        "outputs": (5, ["TensorMetadata"]),
    },
    "TensorMetadata": {"name": (1, _STRING), "datatype": (2, _STRING), "shape": (3, [_INT64])},
    "ModelInferRequest": {
        "model_name": (1, _STRING),
        "model_version": (2, _STRING),
        "id": (3, _STRING),
        "parameters": (4, ["Parameter"]),
        "inputs": (5, ["InferInputTensor"]),
        "outputs": (6, ["InferRequestedOutputTensor"]),
        "raw_input_contents": (7, [_BYTES]),
    },
    "Parameter": {"key": (1, _STRING), "value": (2, "InferParameter")},
    "InferParameter": {  # one of these
        "bool_param": (1, _BOOL),
        "int64_param": (2, _INT64),
        "string_param": (3, _STRING),
        "double_param": (4, _DOUBLE),
        "uint64_param": (5, _UINT64),
    },
    "InferInputTensor": {
        "name": (1, _STRING),
        "datatype": (2, _STRING),
        "shape": (3, [_INT64]),
        "contents": (5, "InferTensorContents"),
    },
    "InferTensorContents": {"uint_contents": (4, [_UINT32]), "bytes_contents": (8, [_BYTES])},
    "InferRequestedOutputTensor": {"name": (1, _STRING)},
    "ModelInferResponse": {
        "model_name": (1, _STRING),
        "model_version": (2, _STRING),
        "id": (3, _STRING),
        "outputs": (5, ["InferOutputTensor"]),
        "raw_output_contents": (6, [_BYTES]),
    },
    "InferOutputTensor": {"name": (1, _STRING), "datatype": (2, _STRING), "shape": (3, [_INT64])},
    "RepositoryIndexRequest": {"repository_name": (1, _STRING), "ready": (2, _BOOL)},  # there is one repository
    "RepositoryIndexResponse": {"models": (1, ["ModelIndex"])},
    "ModelIndex": {"name": (1, _STRING), "version": (2, _STRING), "state": (3, _STRING), "reason": (4, _STRING)},
}
_ONE_OF = "InferParameter"


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="oip.proto", package=PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        if name == _ONE_OF:
            message.oneof_decl.add(name="value")
        for field, (number, kind) in fields.items():
            repeated = isinstance(kind, list)
            declared = message.field.add(name=field, number=number, label=3 if repeated else 1)
            kind = kind[0] if repeated else kind
            if isinstance(kind, str):
                declared.type_name = f".{PACKAGE}.{kind}"
            else:
                declared.type = kind
            if name == _ONE_OF:
                declared.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = pool.FindFileByName(file.name).message_types_by_name
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


MESSAGES = _classes()  # by name
METHODS = tuple(name.removesuffix("Request") for name in MESSAGES if name.endswith("Request"))


def read(name: str, data: bytes) -> Any:
    """A message of that name.

    Raises:
        InputError: it is none.
    """
    try:
        return MESSAGES[name].FromString(data)
    except DecodeError:
        raise InputError(
            f"the request is no {PACKAGE}.{name}: generate the client from the protocol's .proto"
        ) from None


def parse(data: bytes, artifact: Artifact) -> oip.InferRequest:
    """An inference request, a `ModelInferRequest`.

    Raises:
        InputError: naming what is wrong with it, and what is right.
    """
    request = read("ModelInferRequest", data)
    oip.check_input([given.name for given in request.inputs])
    try:
        parameters = oip.Parameters.model_validate({entry.key: _value(entry.value) for entry in request.parameters})
    except ValidationError as error:
        raise InputError(oip.first_of(error, ["parameters"])) from None
    outputs = [output.name for output in request.outputs] or oip.output_tensors(artifact)
    images = _images(request.inputs[0], request.raw_input_contents)
    return oip.ask(
        id=request.id,
        images=images,
        outputs=dict.fromkeys(outputs, True),
        parameters=parameters,
        artifact=artifact,
    )


def render(request: oip.InferRequest, model: str, version: str, tensors: oip.Tensors) -> Any:
    """The answer, a `ModelInferResponse`."""
    answer = MESSAGES["ModelInferResponse"](model_name=model, model_version=version, id=request.id)
    for name, (datatype, values) in tensors.items():
        answer.outputs.add(name=name, datatype=datatype, shape=values.shape)
        answer.raw_output_contents.append(oip.to_bytes(values))
    return answer


def _value(parameter: Any) -> bool | int | float | str | None:
    kind = parameter.WhichOneof("value")
    return getattr(parameter, kind) if kind else None


def _images(given: Any, raw: Sequence[bytes]) -> oip.Images:
    oip.check_shape(given.datatype, given.shape)
    if given.HasField("contents") == bool(raw):
        raise InputError(f"input {oip.INPUT!r} needs either contents or raw_input_contents")
    if raw:
        if len(raw) != 1:
            raise InputError(f"raw_input_contents are {len(raw)}: give one, of the input {oip.INPUT!r}")
        return oip.from_raw(given.datatype, given.shape, raw[0])
    if given.datatype == "BYTES":
        return oip.to_images(given.shape, tuple(given.contents.bytes_contents))
    values = np.array(given.contents.uint_contents, np.uint32)
    if values.max(initial=0) > 255:
        raise InputError(f"input {oip.INPUT!r} holds {values.max()}: give integers from 0 to 255")
    return oip.to_images(given.shape, values.astype(np.uint8))
