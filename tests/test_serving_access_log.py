"""Request ids and the access log round a small ASGI application: what is said, what is not, and where it is kept."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from backbones.errors import InputError
from serving.ingress import access_log
from serving.ingress.access_log import LogFile, RequestLog
from serving.ingress.keys import ApiKeys, KeyFile

KEY = "ann-0123456789abc"
CLASSIFY = "/v2/models/m/classify"


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """200, with the request id that the application sees and the bytes that came."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    ids = [value.decode() for name, value in scope["headers"] if name == b"x-request-id"]
    await JSONResponse({"ids": ids, "bytes": size})(scope, receive, send)


def ask(app: ASGIApp, path: str = CLASSIFY, body: bytes = b"", headers: Any = None) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=body, headers=headers)

    return asyncio.run(post())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


def test_a_request_id_is_the_clients_if_it_is_sane() -> None:
    app = RequestLog(answer)
    response = ask(app, headers={"X-Request-ID": "trace/7:a+b=@c"})
    assert response.headers.get_list("x-request-id") == ["trace/7:a+b=@c"]
    assert response.json()["ids"] == ["trace/7:a+b=@c"]


@pytest.mark.parametrize("sent", [None, "", "a b", 'a"b', "ü".encode(), "a" * 129, ["a", "b"]])
def test_any_other_gets_a_new_one(sent: Any) -> None:
    values = sent if isinstance(sent, list) else [] if sent is None else [sent]
    response = ask(RequestLog(answer), headers=[("X-Request-ID", value) for value in values])
    (found,) = response.headers.get_list("x-request-id")
    assert re.fullmatch("[0-9a-f]{32}", found)
    assert response.json()["ids"] == [found]
    assert ask(RequestLog(answer)).headers["x-request-id"] != found


def test_a_line_says_who_asked_what(path: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{KEY}")
    keys.chmod(0o600)
    log = LogFile(path)
    app = RequestLog(ApiKeys(answer, KeyFile(keys)), log)
    before = time.time()
    good = ask(app, f"{CLASSIFY}?top_k=1&key={KEY}", b"x" * 1000, {"X-API-Key": KEY})
    refused = ask(app, CLASSIFY, b"x", {"X-API-Key": "wrong-0123456789"})
    assert (good.status_code, refused.status_code) == (200, 401)
    log.flush()
    first, second = read(path)
    assert list(first) == ["time", "request_id", "method", "path", "status", "ms", "bytes_in", "model", "key"]
    assert first | {"time": 0, "ms": 0} == {
        "time": 0,
        "request_id": good.headers["x-request-id"],
        "method": "POST",
        "path": CLASSIFY,
        "status": 200,
        "ms": 0,
        "bytes_in": 1000,
        "model": "m",
        "key": "ann",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    from datetime import datetime

    assert before - 1 < datetime.fromisoformat(first["time"].replace("Z", "+00:00")).timestamp() < time.time() + 1
    assert 0 < first["ms"] < 5000
    assert (second["status"], second["request_id"]) == (401, refused.headers["x-request-id"])
    assert "key" not in second  # it was nobody's
    assert KEY not in path.read_text() and "wrong" not in path.read_text()


def test_what_fails_and_who_leaves_are_told(path: Path) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError

    async def leave(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    log = LogFile(path)
    ask(RequestLog(fail, log))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(RequestLog(leave, log)(scope("/v2/models/m/detect"), None, None))  # type: ignore[arg-type]
    log.flush()
    assert [(row["status"], row["path"]) for row in read(path)] == [(500, CLASSIFY), (499, "/v2/models/m/detect")]


def scope(path: str) -> Scope:
    return {"type": "http", "method": "POST", "path": path, "headers": []}


def test_paths_are_escaped_and_bounded_and_probes_left_out(path: Path) -> None:
    log = LogFile(path)
    for asked in ("/-/healthz", "/a%0Ab", "/" + "é" * 5000):
        ask(RequestLog(answer, log), asked)
    log.flush()
    assert [row["path"] for row in read(path)] == ["/a\nb", "/" + "é" * 499]
    assert [row["model"] for row in read(path)] == [None, None]


def test_lines_are_written_without_being_asked(path: Path) -> None:
    ask(RequestLog(answer, LogFile(path)))
    wait_for(lambda: len(read(path)) == 1)


def test_a_file_that_was_renamed_or_truncated(path: Path) -> None:
    log = LogFile(path)
    app = RequestLog(answer, log)
    ask(app, "/1")
    log.flush()
    path.rename(path.with_name("access.log.1"))
    ask(app, "/2")
    log.flush()
    assert [[row["path"] for row in read(file)] for file in (path.with_name("access.log.1"), path)] == [["/1"], ["/2"]]
    os.truncate(path, 0)
    ask(app, "/3")
    log.flush()
    assert [row["path"] for row in read(path)] == ["/3"]


def test_a_slow_disk_costs_lines_not_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "MAX_WAITING", 3)
    monkeypatch.setattr(access_log, "WRITE_S", 60)
    log = LogFile(path)
    for i in range(5):
        ask(RequestLog(answer, log), f"/{i}")
    log.flush()
    assert [row.get("path", row.get("dropped")) for row in read(path)] == ["/0", "/1", "/2", 2]


WRITER = """
import sys
from serving.ingress.access_log import Entry, LogFile
log = LogFile(sys.argv[1])
for i in range(3000):
    log.add(Entry(0.0, f"{sys.argv[2]}-{i}", "POST", "/" + "x" * (i % 300)))
    if i % 50 == 0:
        log.flush()
"""


def test_processes_share_a_file(path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n)]) for n in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]  # what waits at the end is written too
    assert sorted(row["request_id"] for row in read(path)) == sorted(f"{n}-{i}" for n in range(3) for i in range(3000))


def test_a_log_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "none" / "access.log"):
        with pytest.raises(InputError, match=f"cannot write the access log {wrong}: .+: give a file"):
            access_log.check_log(wrong)


def test_the_environment_says_where(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(access_log.LOG_VARIABLE, raising=False)
    assert access_log.from_environment().kwargs == {"log": None}
    monkeypatch.setenv(access_log.LOG_VARIABLE, str(path))
    assert access_log.from_environment().kwargs["log"].path == str(path)
