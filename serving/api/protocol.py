"""HTTP as the endpoints speak it: images in, JSON out, `{"error": …}` for all that fails; no Ray, no torch here."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backbones.errors import InputError, unknown
from backbones.preprocess import ImageError

T = TypeVar("T")
LESS = "send less at once, or raise max_body_bytes"
RETRY_AFTER_S = 1
OVERLOADED = "overloaded, the queue is full: try again"
_RAY_SAYS = {  # Ray's own refusals, in words that help a client
    408: "no answer within the time limit: try again, send less at once, or raise timeout_s in the config",
    503: f"{OVERLOADED} after the seconds in Retry-After",
}


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.message}, self.status, self.headers)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What is wrong with the request, as 400: elsewhere an `InputError` is the server's own."""
    try:
        yield
    except InputError as error:
        raise Refusal(400, str(error)) from None


async def attempt(work: Awaitable[T], timeout_s: float, what: str) -> T | Refusal:
    """What `work` returns; what it raises, as the refusal that fits.

    Args:
        what: names it in the log.
    """
    try:
        return await asyncio.wait_for(work, timeout_s)
    except Refusal as refusal:
        return refusal
    except ImageError as error:
        return Refusal(422, str(error))
    except asyncio.TimeoutError:
        return Refusal(408, f"no answer within {timeout_s:g} s: {_RAY_SAYS[408].partition(': ')[2]}")
    except ClientDisconnect:
        return Refusal(400, "the body ended early")  # to nobody
    except Exception:
        logging.getLogger("ray.serve").exception("%s failed", what)
        return Refusal(500, "internal error: the server's log has its traceback")


async def respond(handler: Callable[[Request], Awaitable[Any]], request: Request, timeout_s: float) -> Response:
    """What `handler` returns, as JSON unless it is a response; what it raises, as the status that fits."""
    request_id = request.headers.get("x-request-id")
    answer = await attempt(handler(request), timeout_s, f"{request.method} {request.url.path} ({request_id})")
    if isinstance(answer, Refusal):
        return answer.response()
    return answer if isinstance(answer, Response) else JSONResponse(answer)


def allow(request: Request, *methods: str) -> None:
    """Refuse any other method."""
    if request.method not in methods:
        names = ", ".join(methods)
        raise Refusal(405, f"{request.method} is not for {request.url.path}: use {names}", {"Allow": names})


def too_large(limit: int, remedy: str = LESS) -> Refusal:
    return Refusal(413, f"the body is over {limit} bytes: {remedy}")


async def read_body(request: Request, limit: int, what: str = "the bytes of a JPEG or PNG file") -> bytes:
    """`read_whole_body`, of a request that needs one.

    Args:
        what: the remedy for an empty one.
    """
    body = await read_whole_body(request, limit)
    if not body:
        raise Refusal(400, f"the body is empty: send {what}")
    return body


async def read_whole_body(request: Request, limit: int, remedy: str = LESS) -> bytes:
    """The whole body, given up as soon as it is known to pass `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large(limit, remedy)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large(limit, remedy)
    return bytes(body)


def read_query(request: Request, *names: str) -> dict[str, str]:
    """The query's parameters, of these names."""
    for key in request.query_params:
        if key not in names:
            raise Refusal(400, str(unknown("parameter", key, names)))
    return dict(request.query_params)


def number(query: Mapping[str, str], name: str, kind: Callable[[str], Any], low: float, high: float) -> Any:
    """A parameter that is a number within [low, high]; None if it is not given."""
    text = query.get(name)
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        raise Refusal(400, f"{name}={text!r} is not {what} from {low:g} to {high:.10g}")
    return value


class JsonErrors:
    """ASGI middleware: Ray answers overload, timeouts and crashes in plain text; say them as JSON too."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        text = b""

        async def send_json(message: Message) -> None:
            nonlocal start, text
            if message["type"] == "http.response.start" and _is_plain_error(message):
                start = message
            elif start is None:
                await send(message)
            else:
                text += message.get("body", b"")
                if not message.get("more_body", False):
                    await _send_error(start, text.decode(errors="replace"), send)

        await self.app(scope, receive, send_json if scope["type"] == "http" else send)


def _is_plain_error(start: Message) -> bool:
    kinds = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return start["status"] >= 400 and not any(kind.startswith(b"application/json") for kind in kinds)


async def _send_error(start: Message, text: str, send: Send) -> None:
    status = start["status"]
    body = json.dumps({"error": _RAY_SAYS.get(status, text)}).encode()
    kept = [(k, v) for k, v in start["headers"] if k.lower() not in (b"content-type", b"content-length")]
    if status == 503 and not any(k.lower() == b"retry-after" for k, _ in kept):
        kept.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    headers = [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": body})
