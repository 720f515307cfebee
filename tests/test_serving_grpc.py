"""The gRPC service on a real Ray Serve, started once, by tritonclient: every call, good and bad input, API keys."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from artifacts import COLOURS, RGB, picture, write_classifier, write_detector
from services import Started, slow_model, started_of, write_keys
from tritonclient.utils import InferenceServerException

from serving.config import ServedModel, ServingConfig

MAX_BODY = 300_000
SLOW_TIMEOUT_S = 1.0
KEY = "a-key-of-some-length"
HEADERS = {"x-api-key": KEY}


@dataclass
class Clients:
    grpc: triton.InferenceServerClient
    http: triton_http.InferenceServerClient

    def infer(self, name: str, *images: bytes, **kwargs: Any) -> triton.InferResult:
        return self.grpc.infer(name, [encoded(triton, *images)], **{"headers": HEADERS, "client_timeout": 60} | kwargs)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("artifacts")
    config = ServingConfig(
        port=0,
        grpc_port=0,
        max_body_bytes=MAX_BODY,
        start_timeout_s=300,
        api_keys=write_keys(folder / "keys.txt", KEY),
        models=(
            ServedModel(name="classifier", artifact=str(write_classifier(folder / "classifier.onnx"))),
            ServedModel(name="detector", artifact=str(write_detector(folder / "detector.onnx"))),
            slow_model(folder, 2 * SLOW_TIMEOUT_S, SLOW_TIMEOUT_S),
        ),
    )
    with started_of(config) as service:
        yield service


@pytest.fixture(scope="module")
def clients(started: Started) -> Iterator[Clients]:
    assert started.service.grpc_url is not None
    http = triton_http.InferenceServerClient(started.service.url.removeprefix("http://"))
    with triton.InferenceServerClient(started.service.grpc_url) as grpc:
        yield Clients(grpc, http)
    http.close()


def encoded(client: Any, *images: bytes) -> Any:
    given = client.InferInput("images", [len(images)], "BYTES")
    given.set_data_from_numpy(np.array(images, object))
    return given


def pixels(client: Any, *colours: str) -> Any:
    """Images of one colour each."""
    values = np.array([np.full((40, 60, 3), RGB[colour], np.uint8) for colour in colours])
    given = client.InferInput("images", list(values.shape), "UINT8")
    given.set_data_from_numpy(values)
    return given


def refused(call: Callable[[], object]) -> tuple[str, str]:
    """The status and the message of a call that is refused."""
    with pytest.raises(InferenceServerException) as raised:
        call()
    return str(raised.value.status()).removeprefix("StatusCode."), raised.value.message()


def test_says_where_it_is(started: Started) -> None:
    assert f"gRPC at {started.service.grpc_url}" in started.lines


def test_says_what_it_is_and_has(clients: Clients) -> None:
    client = clients.grpc
    assert client.is_server_live() and client.is_server_ready()  # without a key, as over HTTP
    about = client.get_server_metadata(headers=HEADERS)
    assert (about.name, list(about.extensions)) == ("cspnet", ["binary_tensor_data", "model_repository"])
    index = client.get_model_repository_index(headers=HEADERS, as_json=True)
    assert {(model["name"], model["version"], model["state"]) for model in index["models"]} == {
        (name, "1", "READY") for name in ("classifier", "detector", "slow")
    }
    for name in ("classifier", "detector"):
        for version in ("", "1"):
            assert client.is_model_ready(name, version, headers=HEADERS)
            told = client.get_model_metadata(name, version, headers=HEADERS, as_json=True)
            http = clients.http.get_model_metadata(name, headers=HEADERS)
            assert {key: told[key] for key in ("name", "versions", "platform")} == {
                key: http[key] for key in ("name", "versions", "platform")
            }
            for side in ("inputs", "outputs"):
                assert told[side] == [{**t, "shape": [str(n) for n in t["shape"]]} for t in http[side]]


@pytest.mark.parametrize("name", ["classifier", "detector"])
@pytest.mark.parametrize("given", ["encoded", "pixels"])
def test_answers_equal_those_of_http_to_the_bit(clients: Clients, name: str, given: str) -> None:
    def inputs(client: Any) -> list[Any]:
        if given == "pixels":
            return [pixels(client, *COLOURS)]
        return [encoded(client, *(picture(colour, kind=kind) for colour in COLOURS for kind in ("PNG", "JPEG")))]

    told = clients.grpc.infer(name, inputs(triton), headers=HEADERS, request_id="abc")
    http = clients.http.infer(name, inputs(triton_http), headers={**HEADERS})  # it adds to them
    response = told.get_response()
    assert (response.id, response.model_name, response.model_version) == ("abc", name, "1")
    names = [output.name for output in response.outputs]
    assert names == [output["name"] for output in http.get_response()["outputs"]]
    for output in names:
        assert told.as_numpy(output).dtype == http.as_numpy(output).dtype
        np.testing.assert_array_equal(told.as_numpy(output), http.as_numpy(output))


def test_parameters(clients: Clients) -> None:
    labels = clients.infer("classifier", picture("blue"), parameters={"top_k": 1}).as_numpy("labels")
    assert labels.tolist() == [[b"blue"]]
    labels = clients.infer("classifier", picture("blue"), parameters={"classes": "red,1"}).as_numpy("labels")
    assert set(labels.ravel()) == {b"red", b"green"}
    for parameters in ({"score_threshold": 0.7}, {"classes": "dog"}):
        found = clients.infer("detector", picture("red"), parameters=parameters)
        assert found.as_numpy("num_detections").tolist() == [1]
        assert found.as_numpy("labels").tolist() == [[b"dog"]]
    outputs = [triton.InferRequestedOutput("boxes")]
    found = clients.infer("detector", picture("red", (300, 200)), outputs=outputs)
    assert [output.name for output in found.get_response().outputs] == ["boxes"]
    np.testing.assert_array_equal(found.as_numpy("boxes")[0, 0], [75, 50, 225, 150])


def test_bad_input_is_an_invalid_argument(clients: Clients) -> None:
    code, message = refused(lambda: clients.infer("classifier", picture("red"), b"no image", picture("blue")))
    assert (code, message.partition(":")[0]) == ("INVALID_ARGUMENT", "element 1 of 3")
    for parameters, words in (
        ({"topk": 1}, "parameters.topk"),
        ({"top_k": 0}, "parameters.top_k"),
        ({"score_threshold": 0.9}, "is for detectors"),
        ({"classes": "rde"}, "did you mean 'red'"),
    ):
        code, message = refused(lambda p=parameters: clients.infer("classifier", picture("red"), parameters=p))  # type: ignore[misc]
        assert code == "INVALID_ARGUMENT" and words in message
    code, message = refused(lambda: clients.infer("classifier", *[b"x"] * 65))
    assert code == "INVALID_ARGUMENT" and "give 1 to 64 images" in message


def test_what_is_not_there_is_not_found(clients: Clients) -> None:
    calls: list[Callable[[], object]] = [
        lambda: clients.infer("classifeir", picture("red")),
        lambda: clients.grpc.get_model_metadata("classifeir", headers=HEADERS),
        lambda: clients.infer("classifier", picture("red"), model_version="2"),
        lambda: clients.grpc.get_model_metadata("classifier", "2", headers=HEADERS),
    ]
    for call, words in zip(calls, ["RepositoryIndex lists them"] * 2 + ["no version '2'"] * 2, strict=True):
        code, message = refused(call)
        assert code == "NOT_FOUND" and words in message
    assert refused(lambda: clients.grpc.get_inference_statistics("classifier", headers=HEADERS))[0] == "UNIMPLEMENTED"


def test_keys_are_asked_for(clients: Clients) -> None:
    for headers in ({}, {"x-api-key": "not-the-right-one"}, {"authorization": "Bearer not-the-right-one"}):
        code, message = refused(lambda h=headers: clients.infer("classifier", picture("red"), headers=h))  # type: ignore[misc]
        assert code == "UNAUTHENTICATED" and "API key" in message
        assert refused(lambda h=headers: clients.grpc.get_server_metadata(headers=h))[0] == "UNAUTHENTICATED"  # type: ignore[misc]
    answer = clients.infer("classifier", picture("red"), headers={"authorization": f"Bearer {KEY}"})
    assert answer.as_numpy("labels")[0, 0] == b"red"


def test_ray_tells_nobody_the_names_of_models(started: Started) -> None:
    """It has pages and calls of its own, that ask for no key."""
    for path in ("/-/routes", "/-/ROUTES"):
        said = httpx.get(f"{started.service.url}{path}", trust_env=False)
        assert said.status_code == 404 and "classifier" not in said.text and list(said.json()) == ["error"]
    with grpc.insecure_channel(str(started.service.grpc_url)) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/ray.serve.RayServeAPIService/ListApplications")(b"", timeout=30)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_request_that_is_too_large_is_refused(clients: Clients) -> None:
    for size in (MAX_BODY + 1, 10_000_000):  # by us, and by gRPC before it is read
        code, message = refused(lambda n=size: clients.infer("classifier", bytes(n)))  # type: ignore[misc]
        assert code == "RESOURCE_EXHAUSTED" and ("max_body_bytes" in message or "larger than max" in message)
    assert clients.infer("classifier", picture("red")).as_numpy("labels")[0, 0] == b"red"


def test_too_slow_and_too_many(clients: Clients) -> None:
    code, message = refused(lambda: clients.infer("slow", picture("red")))
    assert code == "DEADLINE_EXCEEDED" and "no answer within 1 s" in message
    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda _: refused(lambda: clients.infer("slow", picture("red"))), range(12)))
    assert {code for code, _ in told} == {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert all("the queue is full" in message for code, message in told if code == "UNAVAILABLE")
    assert refused(lambda: clients.infer("classifier", picture("red"), client_timeout=1e-4))[0] == "DEADLINE_EXCEEDED"


def test_many_clients_at_once_get_their_own_answers(started: Started, clients: Clients) -> None:
    expected = {colour: clients.infer("classifier", picture(colour)).as_numpy("scores") for colour in COLOURS}

    def client(number: int) -> None:
        with triton.InferenceServerClient(started.service.grpc_url) as grpc:
            for i in range(8):
                colour = COLOURS[(number + i) % len(COLOURS)]
                told = grpc.infer("classifier", [encoded(triton, picture(colour))], headers=HEADERS, request_id=str(i))
                assert told.get_response().id == str(i)
                assert told.as_numpy("labels")[0, 0] == colour.encode()
                np.testing.assert_allclose(told.as_numpy("scores"), expected[colour], rtol=1e-6)
                found = grpc.infer("detector", [encoded(triton, picture(colour))], headers=HEADERS)
                np.testing.assert_array_equal(found.as_numpy("boxes")[0, 1], [0, 0, 30, 40])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(16)))
