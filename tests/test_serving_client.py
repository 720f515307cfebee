"""Clients: try again where that may help, say what the server said where not, keep order; against a scripted server."""

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from backbones.errors import InputError
from backbones.preprocess import ImageError
from serving import calls
from serving.api.schemas import ClassifyAnswer
from serving.calls import ServerError
from serving.client import AsyncClient, Client

OK: ClassifyAnswer = {"model": "colours", "predictions": []}
NOBODY = "http://127.0.0.1:9"


class Script(BaseHTTPRequestHandler):
    """Answers from `answers`, one a request, the last for ever; a function makes its answer of the body.

    "drop" closes the connection, "reset" breaks it, "half" does so within the answer, "hang" says nothing, "trickle"
    answers a byte at a time.
    """

    protocol_version = "HTTP/1.1"
    answers: list[Any]
    seen: list[tuple[str, str, bytes]]
    times: list[float]
    keys: list[str | None]
    connections: set[tuple[str, int]]
    over: threading.Event

    def _reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.seen.append((self.command, self.path, body))
        self.times.append(time.monotonic())
        self.keys.append(self.headers.get("x-api-key"))
        self.connections.add(self.client_address)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer(body)
        if isinstance(answer, str):
            self._misbehave(answer)
            return
        status, value, headers = answer
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def _misbehave(self, how: str) -> None:
        self.close_connection = True
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if how in ("half", "trickle"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
        while how == "hang" and not self.over.wait(0.05):
            pass
        while how == "trickle" and not self.over.wait(0.05):
            self.wfile.write(b" ")

    do_GET = do_POST = _reply

    def log_message(self, *_: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    """Whose clients may leave."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


def scripted() -> type[Script]:
    fresh = {"answers": [], "seen": [], "times": [], "keys": [], "connections": set(), "over": threading.Event()}
    return type("Scripted", (Script,), fresh)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Script]]:
    monkeypatch.setattr(calls, "FIRST_WAIT_S", 0.01)
    handler = scripted()
    server = Quiet(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield handler
    handler.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Blocking:
    """An `AsyncClient` called as a `Client` is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.client = AsyncClient(*args, **kwargs)
        self.loop = asyncio.new_event_loop()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self.client, name)(*args, **kwargs)
            if hasattr(result, "__anext__"):
                return self._each(result)
            return self.loop.run_until_complete(result)

        return call

    def _each(self, results: Any) -> Iterator[Any]:
        try:
            while True:
                yield self.loop.run_until_complete(results.__anext__())
        except StopAsyncIteration:
            pass
        finally:
            self.loop.run_until_complete(results.aclose())
            assert not asyncio.all_tasks(self.loop), "nothing is left under way"

    def __enter__(self) -> "Blocking":
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_sends_the_image_and_the_parameters(script: Any, connect: Any, tmp_path: Path) -> None:
    script.answers = [(200, OK, {})]
    (tmp_path / "image.jpg").write_bytes(b"pixels")
    with connect(script.url) as client:
        assert client.classify("a", b"bytes", top_k=3) == OK
        client.detect("b", tmp_path / "image.jpg", score_threshold=0.5)
        client.classify("a", str(tmp_path / "image.jpg"))
        client.classify("a", b"x", version=2)
        client.detect("a", b"x", 0.0, version="1/2")
        client.metadata("a b")
        client.models()
    assert script.seen == [
        ("POST", "/v2/models/a/classify?top_k=3", b"bytes"),
        ("POST", "/v2/models/b/detect?score_threshold=0.5", b"pixels"),
        ("POST", "/v2/models/a/classify", b"pixels"),
        ("POST", "/v2/models/a/versions/2/classify", b"x"),
        ("POST", "/v2/models/a/versions/1%2F2/detect?score_threshold=0.0", b"x"),
        ("GET", "/v2/models/a%20b", b""),
        ("POST", "/v2/repository/index", b""),
    ]
    assert len(script.connections) == 1, "the connection is kept"
    assert set(script.keys) == {None}


def test_sends_the_key(script: Any, connect: Any) -> None:
    script.answers = [(200, OK, {})]
    with connect(script.url, api_key="secret") as client:
        client.classify("a", b"x")
        client.ready()
    assert script.keys == ["secret", "secret"]
    for key in ("", " ", "secret\n", "schlüssel"):
        with pytest.raises(InputError, match="api_key .* printable ASCII") as caught:
            connect(script.url, api_key=key)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("trouble", [(503, {}, {"retry-after": "0"}), (429, {}, {}), (502, b"", {}),
                                     (503, {}, {"retry-after": "\u00b2"}), "drop", "reset", "half"])  # fmt: skip
def test_tries_again(script: Any, connect: Any, trouble: Any) -> None:
    script.answers = [(200, OK, {}), trouble, trouble, (200, OK, {})]
    with connect(script.url) as client:
        client.classify("a", b"x")  # of a kept connection, too
        assert client.classify("a", b"x") == OK
    assert len(script.seen) == 4
    assert {body for _, _, body in script.seen} == {b"x"}


def test_tries_again_until_the_server_is_there(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "FIRST_WAIT_S", 0.1)
    handler = scripted()
    handler.answers = [(200, OK, {})]
    server = Quiet(("127.0.0.1", 0), handler, bind_and_activate=False)
    server.server_bind()  # refuses until it listens

    def listen() -> None:
        server.server_activate()
        server.serve_forever(0.01)

    timer = threading.Timer(0.15, listen)
    timer.start()
    try:
        with connect(f"http://127.0.0.1:{server.socket.getsockname()[1]}") as client:
            assert client.classify("a", b"x") == OK
    finally:
        server.shutdown()
        timer.join()
        server.server_close()


@pytest.mark.parametrize("status", [429, 503])
def test_waits_as_long_as_the_server_asks(script: Any, connect: Any, status: int) -> None:
    script.answers = [(status, {}, {"retry-after": "1"}), (200, OK, {})]
    with connect(script.url) as client:
        client.classify("a", b"x")
    assert 1 < script.times[1] - script.times[0] < 3


def test_does_not_wait_in_vain(script: Any, connect: Any) -> None:
    script.answers = [(429, {"error": "too fast"}, {"retry-after": "30"})]
    started = time.monotonic()
    with connect(script.url, timeout_s=20) as client, pytest.raises(ServerError, match="too fast") as caught:
        client.classify("a", b"x")
    assert caught.value.status == 429
    assert time.monotonic() - started < 10 and len(script.seen) == 1


def test_waits_grow_with_jitter(script: Any) -> None:
    def waits() -> list[float]:
        call = calls.Call(script.url, timeout_s=1000, tries=12)
        return [call.wait_after(httpx.Response(503)) or 0 for _ in range(11)]

    first, second = waits(), waits()
    longest = [min(5.0, 0.01 * 2**k) for k in range(11)]
    assert all(most / 2 <= wait <= most for wait, most in zip(first, longest, strict=True))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_gives_up_with_the_last_message(script: Any, connect: Any) -> None:
    script.answers = [(503, {"error": "the queue is full"}, {})]
    with connect(script.url, tries=3) as client, pytest.raises(ServerError, match="the queue is full") as caught:
        client.classify("a", b"x")
    assert caught.value.status == 503
    assert len(script.seen) == 3
    script.answers = ["drop"]
    with connect(script.url, tries=2) as client, pytest.raises(ServerError, match="broke the connection") as caught:
        client.classify("a", b"x")
    assert caught.value.status is None
    assert len(script.seen) == 5


@pytest.mark.parametrize(
    ("connect", "how"),
    [(Client, "hang"), (Client, "busy"), (Blocking, "hang"), (Blocking, "busy"), (Blocking, "trickle")],
)
def test_deadline(script: Any, connect: Any, how: str) -> None:
    script.answers = [(503, {"error": "busy"}, {}) if how == "busy" else how]
    started = time.monotonic()
    message = "busy" if how == "busy" else "no answer within 0.5 s"
    with connect(script.url, timeout_s=0.5, tries=1000) as client, pytest.raises(ServerError, match=message):
        client.classify("a", b"x")
    assert time.monotonic() - started < 5
    assert len(script.seen) > 3 if how == "busy" else len(script.seen) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 415, 422, 500])
def test_says_what_the_server_said_and_does_not_insist(script: Any, connect: Any, status: int) -> None:
    script.answers = [(status, {"error": "because"}, {})]
    with connect(script.url) as client, pytest.raises(ServerError, match="because") as caught:
        client.detect("a", b"x")
    assert caught.value.status == status
    assert len(script.seen) == 1


def test_another_kind_of_server(script: Any, connect: Any) -> None:
    script.answers = [(504, b"<html>too late</html>", {}), (200, b"<html>hello</html>", {}), (200, {}, {})]
    with connect(script.url) as client:
        with pytest.raises(ServerError, match="504 Gateway Timeout"):
            client.models()
        with pytest.raises(ServerError, match="something else than JSON"):
            client.models()
        with pytest.raises(ServerError, match="does not say what 'a' is"):
            client.artifact("a")


def test_ready_never_raises(script: Any, connect: Any) -> None:
    script.answers = [(503, {"error": "not yet"}, {}), (200, {"ready": True}, {})]
    with connect(script.url) as client:
        assert [client.ready(), client.ready()] == [False, True]
    with connect(NOBODY) as client:
        assert not client.ready()


def test_no_server_no_file(script: Any, connect: Any, tmp_path: Path) -> None:
    with connect(NOBODY, tries=2) as client, pytest.raises(ServerError, match="cannot reach .* start it"):
        client.models()
    with connect(script.url) as client, pytest.raises(ImageError, match="cannot read .*null"):
        client.classify("a", "a\0b")
    with connect(script.url) as client, pytest.raises(ImageError, match="cannot read .*nothing.jpg: No such file"):
        client.classify("a", tmp_path / "nothing.jpg")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_no_url_no_try_no_time(kind: Any) -> None:
    for url in ("127.0.0.1:9", "ftp://127.0.0.1", "http://"):
        with pytest.raises(InputError, match="is no URL of a server: give one such as"):
            kind(url)
    with pytest.raises(InputError, match="tries=0: give at least 1"):
        kind(NOBODY, tries=0)
    for seconds in (0.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"timeout_s={seconds}: give"):
            kind(NOBODY, timeout_s=seconds)


class Echo:
    """Answers with the body, the earlier ones later; "bad" is refused. Counts what it holds at once."""

    def __init__(self) -> None:
        self.lock, self.active, self.most = threading.Lock(), 0, 0

    def __call__(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        with self.lock:
            self.active += 1
            self.most = max(self.most, self.active)
        time.sleep(0.03 if body.endswith(b"0") else 0.01)
        with self.lock:
            self.active -= 1
        return (422, {"error": "no image"}, {}) if body == b"bad" else (200, body.decode(), {})


@pytest.mark.parametrize("method", ["classify", "detect"])
def test_many_keeps_order_bounds_and_connections(script: Any, connect: Any, method: str, tmp_path: Path) -> None:
    script.answers = [echo := Echo()]
    for i in range(40):
        (tmp_path / str(i)).write_bytes(b"%d" % i)
    option = {"classify": "top_k", "detect": "score_threshold"}[method]
    with connect(script.url) as client:
        many = getattr(client, f"{method}_many")
        found = many("a", (tmp_path / str(i) for i in range(40)), 1, concurrency=4, version="7")
        assert list(found) == [str(i) for i in range(40)]
        assert list(many("a", [])) == []
    assert echo.most == 4
    assert len(script.connections) <= 4, "connections are kept"
    assert {path for _, path, _ in script.seen} == {f"/v2/models/a/versions/7/{method}?{option}=1"}


def test_many_keeps_more_connections_than_a_few(script: Any, connect: Any) -> None:
    script.answers = [Echo()]
    with connect(script.url) as client:
        list(client.classify_many("a", [b"0"] * 120, concurrency=30))
    assert len(script.connections) <= 30


def test_many_takes_no_more_than_it_needs(script: Any, connect: Any) -> None:
    script.answers = [Echo()]
    taken = []

    def images() -> Iterator[bytes]:
        for i in range(10**9):
            taken.append(i)
            yield b"%d" % i

    with connect(script.url) as client:
        found = client.classify_many("a", images(), concurrency=3)
        assert not taken
        assert [next(found) for _ in range(5)] == [str(i) for i in range(5)]
        assert 5 <= len(taken) <= 5 + 6
        found.close()
        time.sleep(0.1)  # what was sent before the end reaches the server
        sent, read = len(script.seen), len(taken)
        time.sleep(0.1)
        assert len(script.seen) == sent <= len(taken) == read, "nothing is left under way"


def test_many_returns_errors_in_their_place(script: Any, connect: Any, tmp_path: Path) -> None:
    script.answers = [Echo()]
    images = [b"1", b"bad", tmp_path / "nothing.jpg", b"2"]
    with connect(script.url) as client:
        first, refused, unread, last = client.detect_many("a", images, on_error="return")
    assert (first, last) == ("1", "2")
    assert isinstance(refused, ServerError) and refused.status == 422 and str(refused) == "no image"
    assert isinstance(unread, ImageError) and "nothing.jpg" in str(unread)


def test_many_raises_the_first_error_with_its_file(script: Any, connect: Any, tmp_path: Path) -> None:
    script.answers = [Echo()]
    (tmp_path / "broken.jpg").write_bytes(b"bad")
    with connect(script.url) as client:
        found = client.classify_many("a", [b"10", tmp_path / "broken.jpg", *[b"0"] * 1000], concurrency=2)
        assert next(found) == "10"
        with pytest.raises(ServerError, match="broken.jpg: no image") as caught:
            next(found)
        assert caught.value.status == 422
        assert next(found, None) is None
        with pytest.raises(ServerError, match="^no image"):
            list(client.detect_many("a", [b"bad"]))
        with pytest.raises(ImageError, match="cannot read .*nothing"):
            list(client.detect_many("a", [tmp_path / "nothing.jpg"]))
    assert len(script.seen) < 20


def test_many_tries_again(script: Any, connect: Any) -> None:
    echo, lock, refused = Echo(), threading.Lock(), set()

    def busy_once(body: bytes) -> Any:
        with lock:
            again = body in refused
            refused.add(body)
        return echo(body) if again else "drop" if body.endswith(b"1") else (503, {"error": "busy"}, {})

    script.answers = [busy_once]
    with connect(script.url) as client:
        assert list(client.classify_many("a", [b"%d" % i for i in range(20)])) == [str(i) for i in range(20)]
    assert len(script.seen) == 40


def test_many_checks_its_arguments_at_once(connect: Any) -> None:
    with connect(NOBODY) as client:
        for many in (client.classify_many, client.detect_many):
            with pytest.raises(InputError, match="concurrency=0: give at least 1"):
                many("a", [], concurrency=0)
            with pytest.raises(InputError, match="unknown on_error 'returns': did you mean 'return'"):
                many("a", [], on_error="returns")


def test_cancelling_a_call_ends_it(script: Any) -> None:
    script.answers = ["hang"]

    async def run() -> None:
        async with AsyncClient(script.url) as client:
            task = asyncio.ensure_future(anext(client.classify_many("a", [b"x"] * 4)))
            while len(script.seen) < 4:
                await asyncio.sleep(0.01)
            task.cancel()
            cancelled = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - cancelled < 10, "the others end too, with the server still silent"
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
