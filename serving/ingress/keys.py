"""API keys and their rate limits, for gRPC and as ASGI middleware round every HTTP server; no Ray, no torch here."""

import hashlib
import hmac
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from backbones.errors import InputError
from serving.api.protocol import Refusal

# Ray calls for the middleware in processes of its own, so that the environment has to carry its settings.
KEYS_VARIABLE, LIMIT_VARIABLE = "CSPNET_API_KEYS", "CSPNET_RATE_LIMIT"
CHECK_S = 1.0  # between two looks at the file of keys

# What is answered without a key: the page, the service's health, and what Ray's HAProxy asks each replica. One word
# only, since a prefix would let /v2/health/../models through to whatever resolves the dots.
_OPEN = re.compile(r"/|/v2/health/[a-z]+/?|/-/healthz")
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*):([!-~]{16,})")
_LIMIT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)/([0-9]{1,9})")
_SEND_IT = "send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
_log = logging.getLogger("ray.serve")


def read_keys(path: str | Path) -> dict[str, str]:
    """The names in a file of `name:key` lines, by key; several keys may share a name. Warns if others can read it.

    Raises:
        InputError: no such file, a line that is neither blank, comment nor `name:key`, a key twice, or none at all.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the API keys in {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8: give a file with a `name:key` a line") from None
    names: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:  # the line may hold a key: not a word of it
            raise InputError(
                f"{path}, line {number}: not `name:key`: give a name of letters, digits, '.', '_' and '-', a colon, "
                "and a key of at least 16 ASCII characters without spaces"
            )
        name, key = match.groups()
        if key in names:
            raise InputError(f"{path}, line {number}: an earlier line has the same key: give each a key of its own")
        names[key] = name
    if not names:
        raise InputError(f"{path} holds no API key: add a `name:key` line, or unset {KEYS_VARIABLE}")
    if mode & 0o077:
        _log.warning("%s holds API keys and is open to others (mode %03o): chmod 600 it", path, mode)
    return names


class KeyFile:
    """The keys of a file, read again within CHECK_S of a request after it changed, so that keys rotate without restart.

    If it is broken then, its old keys stay valid and the log has one warning. Replace the file by a rename: half of it
    is not to be told from fewer keys.

    Args:
        clock: seconds.

    Raises:
        InputError: as `read_keys` does.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic):
        self.path, self._clock = path, clock
        self._looked_at, self._stamp = clock(), _stamp(path)
        self._use(read_keys(path))

    def name_of(self, key: bytes) -> str | None:
        """Whose key this is; None if nobody's. It takes as long for any key, right or wrong."""
        self._refresh()
        digest, found = hashlib.sha256(key).digest(), None
        for known, name in self._digests:
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked_at < CHECK_S:
            return
        self._looked_at, stamp = now, _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # before the file is read: what changes meanwhile is seen next time
        try:
            self._use(read_keys(self.path))
        except InputError as error:
            _log.warning("the API keys of before stay valid: %s", error)

    def _use(self, names: dict[str, str]) -> None:
        self.names = frozenset(names.values())
        self._digests = [(hashlib.sha256(key.encode()).digest(), name) for key, name in names.items()]


def _stamp(path: str | Path) -> tuple[int, ...] | None:
    """What differs after a file was changed. The time of its inode tells that one became readable."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True)
class RateLimit:
    """Requests that a key may send: `burst` at once, and `per_second` in the long run."""

    per_second: float
    burst: int

    @classmethod
    def parse(cls, text: str) -> "RateLimit":
        """From such as `10/20`: requests per second, and burst.

        Raises:
            InputError: anything else, or a zero.
        """
        match = _LIMIT.fullmatch(text.strip())
        limit = cls(float(match[1]), int(match[2])) if match else cls(0, 0)
        if limit.per_second == 0 or limit.burst == 0:
            raise InputError(
                f"{LIMIT_VARIABLE}={text!r} is no rate limit: give requests per second and burst, both above 0, "
                "such as 10/20"
            )
        return limit


class TokenBucket:
    """What a key has left of its rate limit. `now` is in seconds."""

    def __init__(self, limit: RateLimit, now: float):
        self.limit, self._tokens, self._filled_at = limit, float(limit.burst), now

    def take(self, now: float) -> float:
        """Take a token, if there is one; the seconds to wait for it, 0 if it was had."""
        gained = (now - self._filled_at) * self.limit.per_second
        self._tokens, self._filled_at = min(self.limit.burst, self._tokens + gained), now
        if self._tokens < 1:
            return (1 - self._tokens) / self.limit.per_second
        self._tokens -= 1
        return 0.0


class Gate:
    """Who may send a request: 401 without a key of the file, 429 beyond its rate limit.

    A name has one rate limit for all its keys, in each process that answers requests.
    """

    def __init__(self, keys: KeyFile, limit: RateLimit | None = None, clock: Callable[[], float] = time.monotonic):
        self.keys, self.limit, self._clock = keys, limit, clock
        self._buckets: dict[str, TokenBucket] = {}

    def who(self, headers: Mapping[bytes, bytes]) -> str:
        """The name of the key that was sent; headers' names are in lower case.

        Raises:
            Refusal: 401.
        """
        key = _sent_key(headers)
        if not key:
            raise Refusal(401, f"an API key is needed: {_SEND_IT}", {"WWW-Authenticate": "Bearer"})
        name = self.keys.name_of(key)
        if name is None:
            raise Refusal(401, f"no such API key: {_SEND_IT}", {"WWW-Authenticate": "Bearer"})
        return name

    def count(self, name: str) -> None:
        """Take a request from what the name has left.

        Raises:
            Refusal: 429.
        """
        if self.limit is None:
            return
        wait = self._bucket(name, self.limit).take(self._clock())
        if wait:
            message = f"over {self.limit.per_second:g} requests/s: try again after the seconds in Retry-After"
            raise Refusal(429, message, {"Retry-After": str(math.ceil(wait))})

    def _bucket(self, name: str, limit: RateLimit) -> TokenBucket:
        if name not in self._buckets:  # so as many as the file has names, whatever was in it once
            self._buckets = {known: bucket for known, bucket in self._buckets.items() if known in self.keys.names}
            self._buckets[name] = TokenBucket(limit, self._clock())
        return self._buckets[name]


class ApiKeys:
    """ASGI middleware: a `Gate` before the body is read. Who asks is in `scope["state"]["key_name"]` from then on."""

    def __init__(
        self, app: ASGIApp, keys: KeyFile, limit: RateLimit | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self.app, self.gate = app, Gate(keys, limit, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] != "lifespan" and not _OPEN.fullmatch(scope["path"]):
                name = scope.setdefault("state", {})["key_name"] = self.gate.who(dict(scope["headers"]))
                self.gate.count(name)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _sent_key(headers: Mapping[bytes, bytes]) -> bytes:
    if b"x-api-key" in headers:  # Authorization may be a gateway's
        return headers[b"x-api-key"]
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def settings_of_environment() -> dict[str, Any] | None:
    """The arguments of a `Gate` as CSPNET_API_KEYS, a path, and CSPNET_RATE_LIMIT, such as `10/20`, ask for it; None
    without keys.

    Raises:
        InputError: a file that `read_keys` or a limit that `RateLimit.parse` does not take.
    """
    path, text = os.environ.get(KEYS_VARIABLE), os.environ.get(LIMIT_VARIABLE)
    limit = RateLimit.parse(text) if text else None
    if path:
        return {"keys": KeyFile(path), "limit": limit}
    if limit:
        _log.warning("%s=%s limits nobody, since it is a key's: set %s as well", LIMIT_VARIABLE, text, KEYS_VARIABLE)
    return None


def from_environment() -> list[Middleware]:
    """The middleware of `settings_of_environment`, if any."""
    settings = settings_of_environment()
    return [] if settings is None else [Middleware(ApiKeys, **settings)]
