"""A classifier asked beside a detector, whatever may have become of it; its replicas are stand-ins here, not Ray's."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from artifacts import COLOURS, picture, write_classifier, write_detector
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import Request
from starlette.types import Message

from backbones.preprocess import ClassifierPreprocess, ImageError
from serving.api.protocol import Refusal
from serving.app import ModelReplica
from serving.artifact import Artifact, read_artifact
from serving.predictor import Classifier, create_predictor
from serving.runtime import OnnxModel
from serving.service import beside
from serving.service.beside import Classifiers
from serving.service.versions import Route


def method(answer: Callable[..., Any]) -> Any:
    """As one of Ray's handles has it."""

    async def response(*args: Any) -> Any:
        return answer(*args)

    return SimpleNamespace(remote=response)


def never(*_: Any) -> Any:
    raise AssertionError


@pytest.fixture
def handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The models of a service by name, a classifier and a detector; tests change what their replicas answer."""
    classifier = create_predictor(OnnxModel(write_classifier(tmp_path / "c.onnx"), "cpu")).metadata
    detector = create_predictor(OnnxModel(write_detector(tmp_path / "d.onnx"), "cpu")).metadata
    found = {name: handle(artifact) for name, artifact in (("classifier", classifier), ("detector", detector))}

    def get(name: str) -> Any:
        if name not in found:
            raise RayServeException(f"Application '{name}' does not exist.")
        return found[name]

    monkeypatch.setattr(beside.serve, "get_app_handle", get)
    monkeypatch.setattr(beside, "PATIENCE_S", 0.05)
    return found


def handle(artifact: Artifact) -> Any:
    return SimpleNamespace(artifact=method(lambda: artifact), classify_pixels=method(lambda *_: {"model": "it"}))


def refusal(name: str, classifiers: Classifiers | None = None) -> Refusal:
    """What an asking for both comes to."""
    known = classifiers or Classifiers()

    async def ask() -> None:
        await known.classify(await known.find(name), np.zeros((32, 32, 3), np.uint8), 5)

    with pytest.raises(Refusal) as error:
        asyncio.run(ask())
    return error.value


def test_the_pixels_are_those_of_its_own_predictor(handles: dict[str, Any], tmp_path: Path) -> None:
    predictor = create_predictor(OnnxModel(tmp_path / "c.onnx", "cpu"))
    assert isinstance(predictor, Classifier)
    classifier = asyncio.run(Classifiers().find("classifier"))
    for size in ((301, 187), (20, 50)):
        image = picture("green", size, "JPEG")
        own, pixels = classifier.prepare(image, lambda decoded: decoded.size)
        assert own == size
        np.testing.assert_array_equal(pixels, predictor.prepare(image))
    with pytest.raises(ImageError):
        classifier.prepare(b"no image", never)


def test_who_is_no_classifier(handles: dict[str, Any]) -> None:
    assert (refusal("none").status, refusal("detector").status) == (404, 400)
    assert "'detector' is a model for detection" in refusal("detector").message


def test_503_while_there_is_no_replica(handles: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting:
        def __await__(self) -> Any:
            return asyncio.sleep(60).__await__()

    handles["classifier"].classify_pixels = SimpleNamespace(remote=lambda *_: Waiting())
    looks = iter([True, True, False])  # it is slow, and then gone
    monkeypatch.setattr(beside, "_has_replica", lambda name: next(looks))
    found = refusal("classifier")
    assert (found.status, found.headers) == (503, {"Retry-After": "1"})
    assert found.message == "'classifier' has no replica ready: try again"


def test_503_when_it_is_overloaded_or_was_replaced(handles: dict[str, Any]) -> None:
    known = Classifiers()

    def full(*_: Any) -> None:
        raise BackPressureError(num_queued_requests=1, max_queued_requests=1)

    handles["classifier"].classify_pixels = method(full)
    assert (refusal("classifier", known).status, "overloaded" in refusal("classifier", known).message) == (503, True)
    handles["classifier"].classify_pixels = method(lambda *_: None)
    assert "was replaced meanwhile" in refusal("classifier", known).message
    # What has come in its place is asked for what it takes.
    other = ClassifierPreprocess(resize=48, crop=48)
    artifact = asyncio.run(handles["classifier"].artifact.remote()).model_copy(update={"preprocess": other})
    handles["classifier"] = handle(artifact)
    found = asyncio.run(known.find("classifier"))
    assert found.preprocess == other
    assert asyncio.run(known.classify(found, np.zeros((48, 48, 3), np.uint8), 5)) == {"model": "it"}


async def replica(name: str, artifact: Path) -> ModelReplica:
    """One without Ray."""
    made = ModelReplica.__new__(ModelReplica)
    await made.__init__(  # type: ignore[misc]
        name, "1", [Route("1", name)], str(artifact), read_artifact(artifact)[1],
        "cpu", None, False, 1, 4, 30.0, 1_000_000,
    )  # fmt: skip
    return made


async def ask(asked: ModelReplica, path: str, body: bytes) -> tuple[int, Any]:
    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    path, _, query = f"/v2/models/{asked.name}/{path}".partition("?")
    scope = {"type": "http", "method": "POST", "path": path, "query_string": query.encode(), "headers": []}
    response = await asked(Request(scope, receive))
    return response.status_code, json.loads(bytes(response.body))


def test_replicas_answer_both_as_they_answer_each(handles: dict[str, Any], tmp_path: Path) -> None:
    async def run() -> None:
        classifier = await replica("classifier", tmp_path / "c.onnx")
        detector = await replica("detector", tmp_path / "d.onnx")

        async def classify(*args: Any) -> Any:
            return await classifier.classify_pixels(*args)

        handles["classifier"].classify_pixels = SimpleNamespace(remote=classify)
        for colour in COLOURS:
            image = picture(colour, (301, 187), "JPEG")
            status, both = await ask(detector, "detect?classify=classifier&top_k=2&score_threshold=0.55", image)
            assert status == 200
            assert both.pop("classification") == (await ask(classifier, "classify?top_k=2", image))[1]
            assert both == (await ask(detector, "detect?score_threshold=0.55", image))[1]
        for query, status in [
            ("classify=none", 404),
            ("classify=detector", 400),
            ("classify=classifier&top_k=0", 400),
            ("classify=classifier&annotate=png", 400),
            ("top_k=3", 400),
        ]:
            assert (await ask(detector, f"detect?{query}", image))[0] == status, query
        assert (await ask(detector, "detect?classify=classifier", b"no image"))[0] == 422
        assert (await ask(classifier, "classify?classify=classifier", image))[0] == 400

    asyncio.run(run())
