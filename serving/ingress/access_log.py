"""Request ids and the access log, as ASGI middleware round every HTTP server of a service; no Ray, no torch here."""

import atexit
import json
import logging
import os
import re
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backbones.errors import InputError

LOG_VARIABLE = "CSPNET_ACCESS_LOG"  # Ray calls for the middleware in processes of its own
WRITE_S = 0.1  # between two writes
MAX_WAITING = 10_000  # requests; what comes while a disk is that far behind is counted, not kept
MAX_PATH = 500  # characters

_HEADER = b"x-request-id"
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_MODEL = re.compile(r"/v2/models/([^/]+)")
_log = logging.getLogger("ray.serve")


@dataclass(slots=True)
class Entry:
    """A request that was answered; 499 is the status of one whose client left before."""

    time: float  # seconds since 1970 when it came
    request_id: str
    method: str
    path: str
    status: int = 499
    seconds: float = 0.0
    bytes_in: int = 0
    key: str | None = None

    def line(self) -> str:
        """JSON; of the path alone, for a query may hold a secret."""
        model = _MODEL.match(self.path)
        said = {
            "time": _rfc3339(self.time),
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path[:MAX_PATH],
            "status": self.status,
            "ms": round(self.seconds * 1000, 3),
            "bytes_in": self.bytes_in,
            "model": model[1][:MAX_PATH] if model else None,
        }
        return json.dumps(said if self.key is None else {**said, "key": self.key})


class LogFile:
    """A file of lines that many processes append to, each from a thread of its own.

    Every write is of whole lines and appends, so that they do not mix. A file that was renamed is left, and made anew
    under its name; one that was truncated is written on from its start.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self._file = _open(path)
        self._waiting: deque[Entry] = deque()
        self._dropped = 0
        self._wake = threading.Event()
        self._writing = threading.Lock()
        threading.Thread(target=self._work, name="access log", daemon=True).start()
        atexit.register(self.flush)

    def add(self, entry: Entry) -> None:
        """Write it soon; never waits."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(entry)
        else:
            self._dropped += 1
        if not self._wake.is_set():
            self._wake.set()

    def flush(self) -> None:
        """Write what waits."""
        with self._writing:
            lines = [self._waiting.popleft().line() for _ in range(len(self._waiting))]
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                lines.append(json.dumps({"time": _rfc3339(time.time()), "dropped": dropped}))
            if not lines:
                return
            try:
                if _moved(self._file, self.path):
                    renamed, self._file = self._file, _open(self.path)
                    os.close(renamed)
                _write(self._file, "".join(f"{line}\n" for line in lines).encode())
            except (OSError, InputError) as error:
                _log.warning("%d lines of the access log are lost: %s", len(lines), error)

    def _work(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(WRITE_S)  # a write for many lines
            self._wake.clear()
            self.flush()


def _rfc3339(seconds: float) -> str:
    when = datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
    return when.replace("+00:00", "Z")


def check_log(path: str | Path) -> None:
    """Make sure, where a mistake can still be told, that the processes that serve HTTP can write the log.

    Raises:
        InputError: they cannot.
    """
    os.close(_open(path))


def _open(path: str | Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise InputError(
            f"cannot write the access log {path}: {error.strerror}: give a file that can be written"
        ) from None


def _moved(file: int, path: str | Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return True
    return not os.path.samestat(there, os.fstat(file))


def _write(file: int, lines: bytes) -> None:
    while lines:  # all at once, unless the disk is full
        lines = lines[os.write(file, lines) :]


class RequestLog:
    """ASGI middleware: each answer carries `X-Request-ID`, the client's own if it is sane, and gets a line in `log`."""

    def __init__(self, app: ASGIApp, log: LogFile | None = None):
        self.app, self.log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # what Ray's HAProxy asks each replica
            await self.app(scope, receive, send)
            return
        scope, request_id = _identified(scope)
        entry = Entry(time.time(), request_id.decode(), scope["method"], scope["path"])
        began = time.perf_counter()

        async def counted() -> Message:
            message = await receive()
            entry.bytes_in += len(message.get("body", b""))
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                headers = message.get("headers", ())
                if not any(name.lower() == _HEADER for name, _ in headers):  # a refusal's: Ray's own answers have it
                    message = {**message, "headers": [*headers, (_HEADER, request_id)]}
            await send(message)

        try:
            await self.app(scope, counted if self.log else receive, answer)
        except Exception:
            entry.status = 500
            raise
        finally:
            if self.log:
                entry.seconds = time.perf_counter() - began
                entry.key = scope.get("state", {}).get("key_name")
                self.log.add(entry)


def _identified(scope: Scope) -> tuple[Scope, bytes]:
    """A scope whose headers hold one sane request id, and the id."""
    sent = [value for name, value in scope["headers"] if name == _HEADER]
    if len(sent) == 1 and _SANE_ID.fullmatch(sent[0]):
        return scope, sent[0]
    request_id = uuid.uuid4().hex.encode()
    others = [(name, value) for name, value in scope["headers"] if name != _HEADER]
    return {**scope, "headers": [*others, (_HEADER, request_id)]}, request_id


def from_environment() -> Middleware:
    """The middleware, whose log is the file that CSPNET_ACCESS_LOG names, if it is set.

    Raises:
        InputError: the file cannot be written.
    """
    path = os.environ.get(LOG_VARIABLE)
    return Middleware(RequestLog, log=LogFile(path) if path else None)
