"""What a request's images meet inside a replica, without Ray: bounded, and each on its own."""

import asyncio
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from artifacts import picture, write_classifier, write_detector
from starlette.requests import Request

from backbones.preprocess import ImageError
from serving.api.protocol import Refusal
from serving.api.schemas import detect_answer
from serving.predictor import create_predictor
from serving.runtime import OnnxModel
from serving.service import endpoints


class Watched:
    """A predictor that notes how many prepared images there are at once."""

    def __init__(self, path: Path):
        self._own: Any = create_predictor(OnnxModel(path, "cpu"))
        self.metadata, self.there, self.most = self._own.metadata, 0, 0
        self._lock = threading.Lock()

    def prepare(self, image: bytes) -> Any:
        prepared = self._own.prepare(image)
        with self._lock:
            self.there += 1
            self.most = max(self.most, self.there)
        return prepared

    def predict(self, batch: Sequence[Any]) -> Any:
        with self._lock:
            self.there -= len(batch)
        return self._own.predict(batch)


def call(_: str, work: Callable[..., Any], *args: object) -> Any:
    return work(*args)


METRICS: Any = SimpleNamespace(call=call, batch=lambda *_: None)


def asked(*images: bytes) -> Request:
    """A form of several pictures."""
    body = io.BytesIO()
    for i, image in enumerate(images):
        body.write(b'--x\r\nContent-Disposition: form-data; name="image"; filename="%d.png"\r\n\r\n' % i)
        body.write(image + b"\r\n")
    body.write(b"--x--\r\n")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body.getvalue(), "more_body": False}

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    return Request(scope, receive)


@pytest.mark.parametrize("room", [2, 5])
def test_no_more_images_are_decoded_than_there_is_room_for(tmp_path, monkeypatch, room: int) -> None:
    monkeypatch.setattr(endpoints, "MOST_PREPARED", room)
    predictor = Watched(write_classifier(tmp_path / "m.onnx"))

    async def scenario() -> Any:
        served = endpoints.Endpoints("m", predictor, METRICS, 1, 10**7)  # type: ignore[arg-type]
        found = await served.find(asked(*[picture("red")] * 10, b"no picture", picture("blue")))
        await served.batches.close()
        return found

    results = asyncio.run(scenario())["results"]
    assert 0 < predictor.most <= room
    assert [one["predictions"][0]["label"] for one in results if "error" not in one] == ["red"] * 10 + ["blue"]
    assert "error" in results[10] and np.shape(results) == (12,)


def test_what_nobody_will_see_is_not_made() -> None:
    ended = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("slow")
            raise

    async def fails() -> None:
        raise Refusal(503, "no replica")

    async def scenario() -> None:
        with pytest.raises(Refusal):
            await endpoints._all(slow(), fails())
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert ended == ["slow"]


def test_an_answer_longer_than_jpeg_holds_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(endpoints, "LONGEST_JPEG", 50)
    predictor: Any = create_predictor(OnnxModel(write_detector(tmp_path / "m.onnx"), "cpu"))
    (found,) = predictor.predict([predictor.prepare(picture("red"))])
    answer = detect_answer(predictor.metadata, found)
    assert endpoints.draw(picture("red"), answer, "png", predictor.metadata).media_type == "image/png"
    with pytest.raises(ImageError, match="a side of 60 pixels is more than JPEG holds: ask for annotate=png"):
        endpoints.draw(picture("red"), answer, "jpeg", predictor.metadata)
