"""Client: tries again where that may help, says what the server said where not; against a scripted server."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from backbones.errors import InputError
from backbones.preprocess import ImageError
from serving import client as client_module
from serving.client import Client, ServerError
from serving.schemas import ClassifyAnswer

OK: ClassifyAnswer = {"model": "colours", "predictions": []}


class Script(BaseHTTPRequestHandler):
    """Answers from `answers`, one a request, the last for ever; "drop" closes the connection."""

    protocol_version = "HTTP/1.1"
    answers: list[Any]
    seen: list[tuple[str, str, bytes]]
    connections: set[tuple[str, int]]

    def _reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.seen.append((self.command, self.path, body))
        self.connections.add(self.client_address)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == "drop":
            self.close_connection = True
            return
        status, value, headers = answer
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _reply

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Script]]:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.01)
    handler = type("Scripted", (Script,), {"answers": [], "seen": [], "connections": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_sends_the_image_and_the_parameters(script: Any, tmp_path: Path) -> None:
    script.answers = [(200, OK, {})]
    (tmp_path / "image.jpg").write_bytes(b"pixels")
    with Client(script.url) as client:
        assert client.classify("a", b"bytes", top_k=3) == OK
        client.detect("b", tmp_path / "image.jpg", score_threshold=0.5)
        client.classify("a", str(tmp_path / "image.jpg"))
    assert script.seen == [
        ("POST", "/v2/models/a/classify?top_k=3", b"bytes"),
        ("POST", "/v2/models/b/detect?score_threshold=0.5", b"pixels"),
        ("POST", "/v2/models/a/classify", b"pixels"),
    ]
    assert len(script.connections) == 1, "the connection is kept"


def test_tries_again_after_503_and_a_dropped_connection(script: Any) -> None:
    script.answers = [(503, {"error": "busy"}, {"retry-after": "0"}), "drop", (200, OK, {})]
    with Client(script.url) as client:
        assert client.classify("a", b"x") == OK
    assert len(script.seen) == 3


def test_gives_up_with_the_last_message(script: Any) -> None:
    script.answers = [(503, {"error": "the queue is full"}, {})]
    with Client(script.url, tries=3) as client, pytest.raises(ServerError, match="the queue is full") as caught:
        client.classify("a", b"x")
    assert caught.value.status == 503
    assert len(script.seen) == 3


@pytest.mark.parametrize("status", [400, 404, 408, 413, 415, 422, 500])
def test_says_what_the_server_said_and_does_not_insist(script: Any, status: int) -> None:
    script.answers = [(status, {"error": "because"}, {})]
    with Client(script.url) as client, pytest.raises(ServerError, match="because") as caught:
        client.detect("a", b"x")
    assert caught.value.status == status
    assert len(script.seen) == 1


def test_another_kind_of_server(script: Any) -> None:
    script.answers = [(502, b"<html>bad gateway</html>", {}), (200, b"<html>hello</html>", {})]
    with Client(script.url) as client:
        with pytest.raises(ServerError, match="502 Bad Gateway"):
            client.models()
        with pytest.raises(ServerError, match="something else than JSON"):
            client.models()


def test_ready_never_raises(script: Any) -> None:
    script.answers = [(503, {"error": "not yet"}, {}), (200, {"ready": True}, {})]
    with Client(script.url) as client:
        assert [client.ready(), client.ready()] == [False, True]
    with Client("http://127.0.0.1:9") as client:
        assert not client.ready()


def test_no_server_no_url_no_file(script: Any, tmp_path: Path) -> None:
    with Client("http://127.0.0.1:9", tries=2) as client, pytest.raises(ServerError, match="cannot reach .* start it"):
        client.models()
    for url in ("127.0.0.1:9", "ftp://127.0.0.1"):
        with pytest.raises(InputError, match="is no URL of a server: give one such as"):
            Client(url)
    with pytest.raises(InputError, match="tries=0: give at least 1"):
        Client(script.url, tries=0)
    with Client(script.url) as client, pytest.raises(ImageError, match="cannot read .*null"):
        client.classify("a", "a\0b")
    with Client(script.url) as client, pytest.raises(ImageError, match="cannot read .*nothing.jpg: No such file"):
        client.classify("a", tmp_path / "nothing.jpg")
