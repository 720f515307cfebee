"""The Open Inference Protocol's messages and inference requests over gRPC, beside tritonclient's own; no server."""

from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from inferences import CLASSES, CLASSIFIER, DETECTOR, FOUND, JPEG, NONE, PIXELS
from tritonclient.grpc import service_pb2

from backbones.errors import InputError
from serving.api import oip, oip_grpc, oip_json


def request(**changes: Any) -> bytes:
    """An inference request by tritonclient's messages, for one encoded image."""
    message = service_pb2.ModelInferRequest(model_name="m")
    message.inputs.add(name="images", datatype="BYTES", shape=[1])
    message.raw_input_contents.append(len(JPEG).to_bytes(4, "little") + JPEG)
    for name, value in changes.items():
        if name == "parameters":
            for key, (kind, parameter) in value.items():
                setattr(message.parameters[key], kind, parameter)
        elif name == "raw":
            message.ClearField("raw_input_contents")
            message.raw_input_contents.extend(value)
        elif name == "output":
            message.outputs.add(name=value)
        elif name in ("uint_contents", "bytes_contents"):
            getattr(message.inputs[0].contents, name).extend(value)
        elif name == "shape":
            message.inputs[0].shape[:] = value
        else:
            setattr(message.inputs[0], name, value)
    return bytes(message.SerializeToString())


@pytest.mark.parametrize("name", list(oip_grpc.MESSAGES))
def test_fields_are_numbered_as_the_protocol_numbers_them(name: str) -> None:
    if name == "Parameter":  # an entry of a map
        return
    theirs = {
        message.name: message
        for outer in service_pb2.DESCRIPTOR.message_types_by_name.values()
        for message in (outer, *outer.nested_types)
    }[name].fields_by_name
    for field in oip_grpc.MESSAGES[name].DESCRIPTOR.fields:
        other = theirs[field.name]
        assert (field.number, field.type) == (other.number, other.type)
        assert field.is_repeated == other.is_repeated


def test_methods_are_the_services() -> None:
    service = service_pb2.DESCRIPTOR.services_by_name[oip_grpc.SERVICE]
    assert service.full_name == f"{oip_grpc.PACKAGE}.{oip_grpc.SERVICE}"
    assert set(oip_grpc.METHODS) <= set(service.methods_by_name)


def test_encoded_images_raw_and_not() -> None:
    asked = oip_grpc.parse(request(), CLASSIFIER)
    assert (asked.images, asked.id, asked.top_k) == ((JPEG,), "", None)
    assert oip_grpc.parse(request(raw=[], bytes_contents=[JPEG]), CLASSIFIER).images == (JPEG,)


def test_pixels_raw_and_not() -> None:
    pixels = {"datatype": "UINT8", "shape": PIXELS.shape}
    for content in ({"raw": [PIXELS.tobytes()]}, {"raw": [], "uint_contents": PIXELS.ravel().tolist()}):
        np.testing.assert_array_equal(oip_grpc.parse(request(**pixels, **content), CLASSIFIER).images, PIXELS)


def test_parameters_of_every_kind() -> None:
    asked = oip_grpc.parse(
        request(parameters={"top_k": ("int64_param", 2), "classes": ("string_param", "green, 0")}), CLASSIFIER
    )
    assert (asked.top_k, asked.classes) == (2, (1, 0))
    for kind, value in (("double_param", 0.75), ("int64_param", 1), ("uint64_param", 1)):
        asked = oip_grpc.parse(request(parameters={"score_threshold": (kind, value)}), DETECTOR)
        assert asked.score_threshold == value


@pytest.mark.parametrize("results", [[CLASSES, CLASSES], [FOUND, NONE]])
def test_answers_are_those_of_http(results: list[Any]) -> None:
    artifact = CLASSIFIER if results[0] is CLASSES else DETECTOR
    outputs = dict.fromkeys(oip.output_tensors(artifact), True)
    asked = oip.ask("abc", (JPEG, JPEG), outputs, oip.Parameters(), artifact)
    tensors = oip.to_tensors(asked, artifact, results)
    theirs = service_pb2.ModelInferResponse.FromString(oip_grpc.render(asked, "m", "1", tensors).SerializeToString())
    assert (theirs.id, theirs.model_name, theirs.model_version) == ("abc", "m", "1")
    said = triton.InferResult(theirs)
    content, headers = oip_json.render(asked, "m", "1", tensors)
    http = pytest.importorskip("tritonclient.http").InferenceServerClient.parse_response_body(
        content, header_length=int(headers[oip_json.JSON_LENGTH])
    )
    assert [output.name for output in theirs.outputs] == list(outputs)
    for name in outputs:
        assert said.as_numpy(name).dtype == http.as_numpy(name).dtype
        np.testing.assert_array_equal(said.as_numpy(name), http.as_numpy(name))


def test_only_the_wanted_outputs() -> None:
    asked = oip_grpc.parse(request(output="labels"), CLASSIFIER)
    answer = oip_grpc.render(asked, "m", "1", oip.to_tensors(asked, CLASSIFIER, [CLASSES]))
    assert [output.name for output in answer.outputs] == ["labels"]
    assert len(answer.raw_output_contents) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "image"}, "inputs are 'image'"),
        ({"datatype": "FP32"}, "datatype 'FP32': give BYTES"),
        ({"shape": [2]}, r"shape \[2\] and 1 elements"),
        ({"shape": []}, "give 1 to 64 images"),
        ({"shape": [-1]}, "give 1 to 64 images"),
        ({"raw": []}, "needs either contents or raw_input_contents"),
        ({"bytes_contents": [JPEG]}, "needs either contents or raw_input_contents"),
        ({"raw": [b"", b""]}, "raw_input_contents are 2"),
        ({"raw": [b"\x09\0\0\0ab"]}, "element 0 of input 'images' goes beyond the tensor's end"),
        ({"datatype": "UINT8", "shape": [1, 2, 2, 3]}, "and 23 values"),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3], "raw": [], "uint_contents": [0, 1, 256]}, "holds 256"),
        ({"output": "label"}, "unknown output 'label': did you mean 'labels'"),
        ({"parameters": {"topk": ("int64_param", 1)}}, "parameters.topk"),
        ({"parameters": {"top_k": ("int64_param", 0)}}, "parameters.top_k"),
        ({"parameters": {"top_k": ("string_param", "1")}}, "parameters.top_k"),
        ({"parameters": {"top_k": ("bool_param", True)}}, "parameters.top_k"),
        ({"parameters": {"score_threshold": ("double_param", 0.5)}}, "is for detectors"),
        ({"parameters": {"score_threshold": ("double_param", float("nan"))}}, "parameters.score_threshold"),
        ({"parameters": {"classes": ("string_param", "rde")}}, "unknown class 'rde': did you mean 'red'"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        oip_grpc.parse(request(**changes), CLASSIFIER)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff", JPEG, b"{}"])
def test_no_message_is_told_so(data: bytes) -> None:
    with pytest.raises(InputError, match="is no inference.ModelInferRequest"):
        oip_grpc.parse(data, CLASSIFIER)
