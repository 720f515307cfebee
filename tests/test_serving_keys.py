"""API keys and rate limits round a small ASGI application: who gets in, who waits, and what a changed file does."""

import asyncio
import hmac
import logging
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from backbones.errors import InputError
from serving.ingress import keys
from serving.ingress.keys import ApiKeys, KeyFile, RateLimit, from_environment, read_keys

ANN, BOB, BOBS_NEXT = "ann-0123456789abc", "bob:#0123456789abc", "bob-9876543210fed"
FILE = f"# who may ask\n\nann:{ANN}\n  bob:{BOB}  \n"
INFER = "/v2/models/m/classify"


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Guarded:
    """The middleware round an application that says whom it sees, and a clock for both."""

    path: Path
    limit: RateLimit | None = None
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.seen: list[str | None] = []
        self.file = KeyFile(self.path, self.clock)
        self.app = ApiKeys(self._answer, self.file, self.limit, self.clock)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope.get("state", {}).get("key_name"))
        await JSONResponse({"seen": self.seen[-1]})(scope, receive, send)

    def get(self, path: str = INFER, headers: dict[str, str] | None = None) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
                return await client.get(path, headers=headers)

        return asyncio.run(ask())

    def status(self, key: str) -> int:
        return self.get(headers={"X-API-Key": key}).status_code


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "keys", FILE)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What the module logs, warnings and above; a service of an earlier test may have changed its logger."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """Aside and renamed, as keys should be rotated."""
    aside = path.with_name("aside")
    aside.write_text(text)
    aside.chmod(mode)
    aside.rename(path)
    return path


def test_a_file_names_its_keys(path: Path, logged: list[str]) -> None:
    assert read_keys(path) == {ANN: "ann", BOB: "bob"}
    assert read_keys(write(path, f"\ufeffbob:{BOB}\r\nbob:{BOBS_NEXT}")) == {BOB: "bob", BOBS_NEXT: "bob"}
    assert logged == []


@pytest.mark.parametrize(
    "line",
    [
        ANN,
        f":{ANN}",
        f"{ANN}:ann",
        f"an n:{ANN}",
        f"ann: {ANN}",
        f"ann:{ANN} x",
        f"ann:{ANN}é",
        "ann:ann-0123456789a",
    ],
)
def test_a_bad_line_is_named_by_number_and_never_shown(path: Path, line: str) -> None:
    with pytest.raises(InputError, match=r"keys, line 3: not `name:key`") as error:
        read_keys(write(path, f"# first\nbob:{BOB}\n{line}\n"))
    assert "0123" not in str(error.value)


def test_one_key_has_one_name(path: Path) -> None:
    with pytest.raises(InputError, match="line 5: an earlier line has the same key") as error:
        read_keys(write(path, f"{FILE}eve:{ANN}"))
    assert ANN not in str(error.value)


def test_a_file_that_gives_no_keys_is_an_error(path: Path) -> None:
    with pytest.raises(InputError, match="holds no API key"):
        KeyFile(write(path, "# nobody\n"))
    path.write_bytes(f"ann:{ANN}\xff".encode("latin-1"))
    with pytest.raises(InputError, match="not text in UTF-8") as error:
        KeyFile(path)
    assert error.value.__suppress_context__  # which shows the file's bytes
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read the API keys in .*keys: No such file"):
        KeyFile(path)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620])
def test_a_file_open_to_others_is_warned_of(path: Path, logged: list[str], mode: int) -> None:
    write(path, FILE, mode)
    KeyFile(path)
    assert logged == [f"{path} holds API keys and is open to others (mode {mode:o}): chmod 600 it"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {BOB}"},
        {"authorization": f"bearer  {BOB}"},
        {"X-API-Key": BOB},
        {"X-API-Key": BOB, "Authorization": "Basic Z2F0ZXdheTp4"},
    ],
)
def test_a_key_lets_in_and_its_name_is_in_the_state(path: Path, headers: dict[str, str]) -> None:
    answer = Guarded(path).get(headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"seen": "bob"})


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "an API key is needed"),
        ({"X-API-Key": ""}, "an API key is needed"),
        ({"Authorization": "Bearer"}, "an API key is needed"),
        ({"Authorization": f"Basic {BOB}"}, "an API key is needed"),
        ({"Authorization": BOB}, "an API key is needed"),
        ({"Authorization": f"Bearer {BOB[:-1]}"}, "no such API key"),
        ({"Authorization": f"Bearer {BOB}x"}, "no such API key"),
        ({"X-API-Key": BOB.upper()}, "no such API key"),
        ({"X-API-Key": f"bob:{BOB}"}, "no such API key"),
        ({"X-API-Key": "bob"}, "no such API key"),
        ({"X-API-Key": "é" * 17}, "no such API key"),
        ({"X-API-Key": ANN + "x", "Authorization": f"Bearer {BOB}"}, "no such API key"),
    ],
)
def test_all_else_is_401(path: Path, logged: list[str], headers: dict[str, str], reason: str) -> None:
    guarded = Guarded(path)
    answer = guarded.get(headers={name: value.encode("latin-1") for name, value in headers.items()})  # type: ignore[misc]
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json() == {"error": f"{reason}: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`"}
    assert guarded.seen == []
    assert logged == []


@pytest.mark.parametrize(
    "url", ["/", "/?model=m", "/v2/health/live", "/v2/health/ready", "/v2/health/ready/", "/-/healthz"]
)
def test_the_page_and_health_are_open(path: Path, url: str) -> None:
    guarded = Guarded(path, RateLimit(1, 1))
    assert [guarded.get(url).status_code for _ in range(3)] == [200, 200, 200]


@pytest.mark.parametrize(
    "url",
    [
        "/v2",
        "/v2/health",
        "/v2/health/",
        "/v2/models/m/ready",
        "/docs",
        "/-/routes",
        "/index.html",
        "/v2/health/%2e%2e/models/m/classify",
        "/v2/health/ready/..%2f..%2fmodels/m",
        "/%0a",
        "/v2/health/ready%0a",
    ],
)
def test_nothing_else_is_open(path: Path, url: str) -> None:
    assert Guarded(path).get(url).status_code == 401


def call(app: ApiKeys, scope: Scope) -> list[Any]:
    """What `app` sends to a client whose body may not be read."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("read before the key was known")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def test_a_refused_body_is_not_read(path: Path) -> None:
    scope = {"type": "http", "method": "POST", "path": INFER, "headers": [(b"content-length", b"100000000")]}
    assert call(Guarded(path).app, scope)[0]["status"] == 401


def test_websockets_need_a_key_too_and_lifespan_none(path: Path) -> None:
    guarded = Guarded(path)
    started = call(guarded.app, {"type": "websocket", "path": INFER, "headers": []})[0]
    assert (started["type"], started["status"]) == ("websocket.http.response.start", 401)
    assert guarded.seen == []
    call(guarded.app, {"type": "lifespan"})
    assert guarded.seen == [None]


def test_every_key_is_compared_in_constant_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, "\n".join(f"name{i}:key-of-some-length-{i}" for i in range(7)))
    file, compared = KeyFile(path), []

    def compare(sent: bytes, known: bytes) -> bool:
        compared.append((len(sent), len(known)))
        return hmac.compare_digest(sent, known)

    monkeypatch.setattr(keys, "hmac", type("hmac", (), {"compare_digest": staticmethod(compare)}))
    for key, name in [("key-of-some-length-0", "name0"), ("key-of-some-length-6", "name6"), ("k", None)]:
        compared.clear()
        assert file.name_of(key.encode()) == name
        assert compared == [(32, 32)] * 7


def replaced(path: Path) -> None:
    before = path.stat()
    write(path, FILE.replace(ANN, ANN[::-1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` does


def rewritten(path: Path) -> None:
    path.write_text(f"# longer by this\n{FILE.replace(ANN, ANN[::-1])}")


def touched(path: Path) -> None:
    path.write_text(FILE.replace(ANN, ANN[::-1]))
    os.utime(path, (2_000_000_000, 2_000_000_000))


@pytest.mark.parametrize("rotate", [replaced, rewritten, touched])
def test_keys_rotate_without_restart(path: Path, logged: list[str], rotate: Callable[[Path], None]) -> None:
    guarded = Guarded(path)
    guarded.clock.now += 5
    assert (guarded.status(ANN), guarded.status(ANN[::-1])) == (200, 401)
    rotate(path)
    guarded.clock.now += 0.9  # looked at within the second
    assert (guarded.status(ANN), guarded.status(ANN[::-1])) == (200, 401)
    guarded.clock.now += 0.2
    assert (guarded.status(ANN), guarded.status(ANN[::-1]), guarded.status(BOB)) == (401, 200, 200)
    assert logged == []


def test_the_file_is_read_only_when_it_changed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded, reads = Guarded(path), []
    monkeypatch.setattr(keys, "read_keys", lambda path: reads.append(path) or read_keys(path))
    for _ in range(5):
        guarded.clock.now += 2
        assert guarded.status(ANN) == 200
    assert reads == []
    write(path, FILE)
    for _ in range(5):
        guarded.clock.now += 2
        assert guarded.status(ANN) == 200
    assert reads == [path]


def test_broken_rotation_keeps_the_old_keys_and_warns_once_a_change(path: Path, logged: list[str]) -> None:
    guarded = Guarded(path)

    def later() -> list[int]:
        statuses = []
        for _ in range(3):
            guarded.clock.now += 2
            statuses += [guarded.status(ANN), guarded.status(BOBS_NEXT)]
        return statuses

    write(path, f"bob:{BOBS_NEXT}\n{ANN}")
    assert later() == [200, 401] * 3
    assert logged == [f"the API keys of before stay valid: {path}, line 2: {logged[0].partition('line 2: ')[2]}"]
    path.unlink()
    assert later() == [200, 401] * 3
    assert len(logged) == 2 and "No such file" in logged[1]
    write(path, f"bob:{BOBS_NEXT}\n")
    assert later() == [401, 200] * 3
    assert len(logged) == 2
    path.chmod(0o644)
    assert later() == [401, 200] * 3
    assert len(logged) == 3 and "open to others" in logged[2]
    assert not [line for line in logged if ANN in line or BOBS_NEXT in line]


def test_a_key_over_its_limit_waits(path: Path, logged: list[str]) -> None:
    guarded = Guarded(path, RateLimit(per_second=10, burst=3))
    assert [guarded.status(ANN) for _ in range(4)] == [200, 200, 200, 429]
    refused = guarded.get(headers={"X-API-Key": ANN})
    assert refused.headers["retry-after"] == "1"
    assert refused.json() == {"error": "over 10 requests/s: try again after the seconds in Retry-After"}
    assert guarded.seen == ["ann"] * 3
    assert guarded.status(BOB) == 200  # a limit of its own
    guarded.clock.now += 0.21
    assert [guarded.status(ANN) for _ in range(3)] == [200, 200, 429]
    guarded.clock.now += 1e6  # no more than the burst is saved
    assert [guarded.status(ANN) for _ in range(4)] == [200, 200, 200, 429]
    assert logged == []


def test_retry_after_is_when_there_is_a_token_again(path: Path) -> None:
    guarded = Guarded(path, RateLimit(per_second=0.25, burst=1))
    assert guarded.status(ANN) == 200
    guarded.clock.now += 0.5
    assert guarded.get(headers={"X-API-Key": ANN}).headers["retry-after"] == "4"  # of 3.5 s
    guarded.clock.now += 3
    assert guarded.status(ANN) == 429
    guarded.clock.now += 0.5
    assert guarded.status(ANN) == 200


def test_who_is_over_the_limit_is_known_to_the_log(path: Path) -> None:
    scope = {"type": "http", "method": "GET", "path": INFER, "headers": [(b"x-api-key", ANN.encode())]}
    guarded = Guarded(path, RateLimit(1, 1))
    call(guarded.app, {**scope})
    assert call(guarded.app, scope)[0]["status"] == 429
    assert scope["state"] == {"key_name": "ann"}


def test_both_keys_of_a_name_share_its_limit_and_rotation_does_not_refill_it(path: Path) -> None:
    guarded = Guarded(write(path, f"bob:{BOB}\nbob:{BOBS_NEXT}"), RateLimit(per_second=0.01, burst=2))
    assert [guarded.status(BOB), guarded.status(BOBS_NEXT), guarded.status(BOBS_NEXT)] == [200, 200, 429]
    write(path, f"bob:{BOBS_NEXT}\n")
    guarded.clock.now += 2
    assert [guarded.status(BOB), guarded.status(BOBS_NEXT)] == [401, 429]


def test_without_a_limit_a_key_may_send_what_it_likes(path: Path) -> None:
    guarded = Guarded(path)
    assert {guarded.status(ANN) for _ in range(100)} == {200}


def test_unknown_keys_leave_nothing_behind(path: Path) -> None:
    guarded = Guarded(path, RateLimit(10, 20))

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        assert message.get("status", 401) == 401

    async def flood(start: int, count: int) -> None:
        for i in range(start, start + count):
            headers = [(b"authorization", f"Bearer unknown-{i:020}".encode())]
            await guarded.app({"type": "http", "path": INFER, "headers": headers}, receive, send)

    asyncio.run(flood(0, 200))
    tracemalloc.start()
    try:
        asyncio.run(flood(200, 200))
        before = tracemalloc.get_traced_memory()[0]
        asyncio.run(flood(400, 5000))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000  # 4 bytes a request
    assert guarded.app.gate._buckets == {}


def test_names_that_were_rotated_out_leave_nothing_behind(path: Path) -> None:
    guarded = Guarded(path, RateLimit(10, 20))
    for i in range(50):
        write(path, f"name{i}:key-of-some-length-{i}\n")
        guarded.clock.now += 2
        assert guarded.status(f"key-of-some-length-{i}") == 200
    assert list(guarded.app.gate._buckets) == ["name49"]


def test_the_environment_configures_it(path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    for name in ("CSPNET_API_KEYS", "CSPNET_RATE_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    assert from_environment() == []
    assert logged == []
    monkeypatch.setenv("CSPNET_RATE_LIMIT", "2.5/20")
    assert from_environment() == []  # without keys no limits, which is said
    assert logged == ["CSPNET_RATE_LIMIT=2.5/20 limits nobody, since it is a key's: set CSPNET_API_KEYS as well"]
    monkeypatch.setenv("CSPNET_API_KEYS", str(path))
    (middleware,) = from_environment()
    app: Any = middleware.cls(Guarded(path)._answer, *middleware.args, **middleware.kwargs)  # as Ray does
    assert (app.gate.limit, app.gate.keys.path) == (RateLimit(2.5, 20), str(path))
    monkeypatch.delenv("CSPNET_RATE_LIMIT")
    assert from_environment()[0].kwargs["limit"] is None
    monkeypatch.setenv("CSPNET_API_KEYS", str(path.with_name("missing")))
    with pytest.raises(InputError, match="missing: No such file"):
        from_environment()


@pytest.mark.parametrize(
    "text", ["10", "10/", "/20", "0/20", "10/0", "-1/5", "10/2.5", "inf/2", "nan/2", "1e3/5", "a/b", " "]
)
def test_what_is_no_rate_limit_is_said(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CSPNET_RATE_LIMIT", text)
    with pytest.raises(InputError, match="CSPNET_RATE_LIMIT=.* is no rate limit: .* such as 10/20"):
        from_environment()
