"""The Open Inference Protocol's bytes, by hand and by the real tritonclient."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from inferences import CLASSES, CLASSIFIER, DETECTOR, FOUND, JPEG, NONE, PIXELS

from backbones.errors import InputError
from serving.api import oip, oip_json
from serving.api.schemas import detect_answer
from serving.artifact import Artifact, DetectorArtifact
from serving.predictor import Classification, Detections


def encoded(*images: bytes, **changes: Any) -> dict[str, Any]:
    data = [base64.b64encode(image).decode() for image in images]
    return {"name": "images", "datatype": "BYTES", "shape": [len(images)], "data": data} | changes


def parse(artifact: Artifact, *inputs: dict[str, Any], **others: Any) -> oip.InferRequest:
    return oip_json.parse(json.dumps({"inputs": inputs} | others).encode(), None, artifact)


def answer(request: oip.InferRequest, artifact: Artifact, *results: Classification | Detections) -> dict[str, Any]:
    content, headers = oip_json.render(request, "m", "1", oip.to_tensors(request, artifact, results))
    assert headers == {"content-type": "application/json"}
    values: dict[str, Any] = json.loads(content)
    return values


def values(said: dict[str, Any]) -> dict[str, Any]:
    return {output["name"]: np.reshape(output["data"], output["shape"]).tolist() for output in said["outputs"]}


def test_encoded_images_as_base64() -> None:
    request = parse(CLASSIFIER, encoded(JPEG, b"other"), id="abc")
    assert request.images == (JPEG, b"other")
    assert parse(CLASSIFIER, encoded(JPEG, b"o", shape=[2, 1], data=[["aQ=="], ["ag=="]])).images == (b"i", b"j")
    said = answer(request, CLASSIFIER, CLASSES, CLASSES)
    assert (said["id"], said["model_name"], said["model_version"]) == ("abc", "m", "1")
    assert values(said)["indices"] == [[2, 0, 1]] * 2
    assert values(said)["labels"] == [["blue", "red", "green"]] * 2
    assert np.float32(values(said)["scores"][0][0]) == CLASSES.probabilities[0]


def test_pixels_as_numbers_flat_and_nested() -> None:
    for data in (PIXELS.tolist(), PIXELS.ravel().tolist()):
        given = {"name": "images", "datatype": "UINT8", "shape": list(PIXELS.shape), "data": data}
        np.testing.assert_array_equal(parse(CLASSIFIER, given).images, PIXELS)


def test_top_k_and_class_filter() -> None:
    for parameters, indices in (({"top_k": 2}, [2, 0]), ({"classes": "green, 0"}, [0, 1]), ({"top_k": 99}, [2, 0, 1])):
        request = parse(CLASSIFIER, encoded(JPEG), parameters=parameters)
        assert values(answer(request, CLASSIFIER, CLASSES))["indices"] == [indices]
    for parameters, scores in (
        ({"score_threshold": 0.7}, [0.9]), ({"top_k": 1}, [0.9]), ({"classes": DETECTOR.classes[0]}, [0.6]),
    ):  # fmt: skip
        found = values(answer(parse(DETECTOR, encoded(JPEG), parameters=parameters), DETECTOR, FOUND))
        np.testing.assert_allclose(found["scores"], [scores])
        assert found["num_detections"] == [1]


def test_a_threshold_keeps_what_detect_keeps() -> None:
    """0.7 as a float32 is below 0.7."""
    scores = np.array([0.9, 0.7], np.float32)
    found = Detections(FOUND.boxes, scores, FOUND.indices, FOUND.size)
    tensors = values(answer(parse(DETECTOR, encoded(JPEG), parameters={"score_threshold": 0.7}), DETECTOR, found))
    assert isinstance(DETECTOR, DetectorArtifact)
    assert len(detect_answer(DETECTOR, found, score_threshold=0.7)["detections"]) == tensors["num_detections"][0] == 1


def test_detections_of_several_images_are_padded() -> None:
    found = values(answer(parse(DETECTOR, encoded(JPEG, JPEG)), DETECTOR, NONE, FOUND))
    assert found["num_detections"] == [0, 2]
    assert found["boxes"] == [[[0.0] * 4] * 2, FOUND.boxes.tolist()]
    assert found["labels"] == [["", ""], [DETECTOR.classes[1], DETECTOR.classes[0]]]
    assert found["category_ids"][1] == [DETECTOR.category_ids[1], DETECTOR.category_ids[0]]  # type: ignore[union-attr]


def test_nothing_found_at_all() -> None:
    found = values(answer(parse(DETECTOR, encoded(JPEG)), DETECTOR, NONE))
    assert (found["boxes"], found["num_detections"]) == ([[]], [0])


def test_only_the_wanted_outputs() -> None:
    request = parse(CLASSIFIER, encoded(JPEG), outputs=[{"name": "labels"}])
    assert list(values(answer(request, CLASSIFIER, CLASSES))) == ["labels"]


@pytest.mark.parametrize("binary", [False, True])
def test_tritonclient_sends_and_reads(binary: bool) -> None:
    http = pytest.importorskip("tritonclient.http")
    images = http.InferInput("images", [2], "BYTES")
    images.set_data_from_numpy(np.array([JPEG, b"x\x00"], object), binary_data=True)
    outputs = [http.InferRequestedOutput(name, binary_data=binary) for name in oip.output_tensors(DETECTOR)]
    body, length = http.InferenceServerClient.generate_request_body([images], outputs, parameters={"top_k": 1})
    request = oip_json.parse(body, str(length), DETECTOR)
    assert request.images == (JPEG, b"x\x00")
    content, headers = oip_json.render(request, "m", "1", oip.to_tensors(request, DETECTOR, [FOUND, NONE]))
    said = headers.get(oip_json.JSON_LENGTH)
    assert (said is not None) == binary
    result = http.InferenceServerClient.parse_response_body(content, header_length=int(said) if said else None)
    np.testing.assert_array_equal(result.as_numpy("boxes"), [[[1, 2, 3, 4]], [[0] * 4]])
    np.testing.assert_array_equal(result.as_numpy("num_detections"), [1, 0])
    labels = [[label.decode() if binary else label for label in row] for row in result.as_numpy("labels").tolist()]
    assert labels == [[DETECTOR.classes[1]], [""]]


def test_tritonclient_sends_pixels() -> None:
    http = pytest.importorskip("tritonclient.http")
    for binary in (True, False):
        images = http.InferInput("images", list(PIXELS.shape), "UINT8")
        images.set_data_from_numpy(PIXELS, binary_data=binary)
        body, length = http.InferenceServerClient.generate_request_body([images])
        request = oip_json.parse(body, None if length is None else str(length), CLASSIFIER)
        np.testing.assert_array_equal(request.images, PIXELS)


UINT8 = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": []}, "inputs are none: give the one input 'images'"),
        ({"inputs": [encoded(JPEG, name="image")]}, "inputs are 'image'"),
        ({"inputs": [encoded(JPEG), encoded(JPEG)]}, "give the one input"),
        ({"inputs": [encoded(JPEG, datatype="FP32")]}, "datatype 'FP32': give BYTES"),
        ({"inputs": [encoded(JPEG, shape=[2])]}, r"shape \[2\] and 1 elements"),
        ({"inputs": [encoded(JPEG, shape=[])]}, "give 1 to 64 images"),
        ({"inputs": [encoded(JPEG, shape=[0], data=[])]}, "give 1 to 64 images"),
        ({"inputs": [encoded(JPEG, shape=[-1])]}, "give 1 to 64 images"),
        ({"inputs": [encoded(JPEG, shape=[10**30])]}, "give 1 to 64 images"),
        ({"inputs": [encoded(JPEG, shape=[1, 2])]}, r"encoded images have \[N\]"),
        ({"inputs": [encoded(JPEG, data=["???"])]}, "element 0 of input 'images' is no base64"),
        ({"inputs": [encoded(JPEG, data=["é"])]}, "is no base64"),
        ({"inputs": [encoded(JPEG, data=[7])]}, "holds int: BYTES in JSON are strings of base64"),
        ({"inputs": [encoded(JPEG, data=None)]}, "either data or"),
        ({"inputs": [encoded(JPEG, parameters={"binary_data_size": 3})]}, "either data or"),
        ({"inputs": [encoded(JPEG, data=None, parameters={"binary_data_size": 3})]}, "0 bytes follow the JSON"),
        ({"inputs": [UINT8 | {"shape": [1, 1, 3]}]}, r"UINT8 images have \[N, height, width, 3\]"),
        ({"inputs": [UINT8 | {"shape": [1, 1, 0, 3], "data": []}]}, "UINT8 images have"),
        ({"inputs": [UINT8 | {"shape": [1, 2, 2, 3]}]}, "and 6 values"),
        ({"inputs": [UINT8 | {"data": [0, 1, 2, 3, 4, 256]}]}, "integers from 0 to 255"),
        ({"inputs": [UINT8 | {"data": [0, 1, 2, 3, 4, -1]}]}, "integers from 0 to 255"),
        ({"inputs": [UINT8 | {"data": [0, 1, 2, 3, 4, 10**30]}]}, "integers from 0 to 255"),
        ({"inputs": [UINT8 | {"data": [0.5] * 6}]}, "integers from 0 to 255"),
        ({"inputs": [UINT8 | {"data": [True] * 6}]}, "integers from 0 to 255"),
        ({"inputs": [UINT8 | {"data": "abcdef"}]}, "integers from 0 to 255"),
        ({"inputs": [UINT8 | {"data": [[1, 2], [3]]}]}, "in rows of one length"),
        ({"outputs": [{"name": "label"}]}, "unknown output 'label': did you mean 'labels'"),
        ({"parameters": {"topk": 1}}, "parameters.topk"),
        ({"parameters": {"top_k": 0}}, "parameters.top_k"),
        ({"parameters": {"top_k": "1"}}, "parameters.top_k"),
        ({"parameters": {"score_threshold": 0.5}}, "score_threshold=0.5 is for detectors"),
        ({"parameters": {"classes": "rde"}}, "unknown class 'rde': did you mean 'red'"),
        ({"parameters": {"classes": "3"}}, "unknown class '3'"),
        ({"parameters": []}, "parameters: "),
        ({"id": 7}, "id: "),
        ({"inputs": None}, "inputs: "),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(change: dict[str, Any], words: str) -> None:
    body = json.dumps({"inputs": [encoded(JPEG)]} | change).encode()
    with pytest.raises(InputError, match=words) as raised:
        oip_json.parse(body, None, CLASSIFIER)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b"\xff\xd8\xff\xe0", b'{"inputs": ' + b"[" * 100_000])
def test_no_json_is_told_so(body: bytes) -> None:
    with pytest.raises(InputError, match="a request is such as"):
        oip_json.parse(body, None, CLASSIFIER)


def test_a_threshold_below_the_artefacts_own() -> None:
    with pytest.raises(InputError, match=r"score_threshold=0.1 is below 0.5"):
        parse(DETECTOR, encoded(JPEG), parameters={"score_threshold": 0.1})


def binary_request(tail: bytes, size: int, shape: list[int]) -> tuple[bytes, str]:
    given = {"name": "images", "datatype": "BYTES", "shape": shape, "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [given]}).encode()
    return text + tail, str(len(text))


@pytest.mark.parametrize(
    ("tail", "size", "words"),
    [
        (b"\x03\0\0\0ab", 6, "element 0 of input 'images' goes beyond the tensor's end"),
        (b"\x01\0\0\0a\x01\0", 7, "element 1 of input 'images' goes beyond the tensor's end"),
        (b"\x01\0\0\0a", 4, "5 bytes follow the JSON, and binary_data_size is 4"),
        (b"\x01\0\0\0a\x01\0\0\0b", 10, r"shape \[1\] and 2 elements"),
    ],
)
def test_broken_binary_tensors(tail: bytes, size: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        oip_json.parse(*binary_request(tail, size, [1]), CLASSIFIER)


@pytest.mark.parametrize("length", ["-1", "x", "", "999999", "²", "9" * 5000])
def test_a_wrong_json_length(length: str) -> None:
    with pytest.raises(InputError, match="Inference-Header-Content-Length is"):
        oip_json.parse(json.dumps({"inputs": [encoded(JPEG)]}).encode(), length, CLASSIFIER)
