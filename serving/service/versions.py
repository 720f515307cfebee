"""Several versions of a model: which one answers a request, and copies for those that only listen; no torch here.

The heaviest version's replicas own the model's path. They answer their own share at once, hand the rest on to the
other versions, and copy requests to shadows. What names a version goes there without them.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.types import Message

from serving.api.protocol import RETRY_AFTER_S, Refusal, read_whole_body

HEADER = "X-Model-Version"  # of an answer: who gave it
Reply: TypeAlias = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers, body
MOST_COPIES = 32  # under way from one replica to its shadows; what comes then is not copied


def route_prefix(name: str) -> str:
    """Where a model's application lies."""
    return f"/v2/models/{name}"


def read_path(path: str, name: str) -> tuple[str | None, str]:
    """The version that a path names, if it does, and the action after it."""
    action = path.removeprefix(route_prefix(name)).strip("/")
    if action != "versions" and not action.startswith("versions/"):
        return None, action
    version, _, action = action.removeprefix("versions").strip("/").partition("/")
    return version, action


@dataclass(frozen=True)
class Route:
    """A version, its Ray Serve application, its weight among those that answer, and its share of copies."""

    version: str
    application: str
    weight: float = 1.0
    shadow: float = 0.0


@dataclass(frozen=True)
class Handed:
    """A request as one replica hands it to another."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def request(self) -> Request:
        async def receive() -> Message:
            return {"type": "http.request", "body": self.body, "more_body": False}

        scope = {
            "type": "http",
            "method": self.method,
            "path": self.path,
            "query_string": self.query,
            "headers": self.headers,
        }
        return Request(scope, receive)


async def hand(request: Request, limit: int) -> Handed:
    """A request that can be handed on, its body read."""
    body = await read_whole_body(request, limit)
    return Handed(request.method, request.url.path, request.scope["query_string"], request.headers.raw, body)


class Versions:
    """What a replica knows of its model's versions, its own among them.

    Args:
        routes: all of them, for the replicas that own the model's path; else the own one.
        timeout_s: the model's. Where chance chose the other version, that gets half of it.
        count: takes a shadow's version and what became of a copy: answered, failed or dropped.
    """

    def __init__(
        self, name: str, own: str, routes: Sequence[Route], timeout_s: float, count: Callable[[str, str], object]
    ):
        self.name, self.own, self.timeout_s, self._count = name, own, timeout_s, count
        self._others = {route.version: route for route in routes if route.version != own}
        self._routes, self._weights = list(routes), [route.weight for route in routes]
        self._shadows = [route for route in routes if route.shadow]
        self._handles: dict[str, Any] = {}
        self._copies: set[asyncio.Task[None]] = set()

    def choose(self, asked: str | None, infers: bool) -> str:
        """The version that is to answer: the one that is asked for, or of an inference by weight one of all."""
        if asked is not None or not infers or not self._others:
            return asked if asked in self._others else self.own  # one that is not there, the own one refuses
        return random.choices(self._routes, self._weights)[0].version

    def shadows(self, asked: str | None, infers: bool) -> list[Route]:
        """Who gets a copy."""
        if asked is not None or not infers:
            return []
        return [route for route in self._shadows if random.random() < route.shadow]

    async def ask(self, version: str, handed: Handed | bytes, named: bool) -> Reply | None:
        """What another version answers; None if it cannot and the request did not name it."""
        try:
            reply = self._reply(self._others[version], handed)
            return await asyncio.wait_for(reply, self.timeout_s if named else self.timeout_s / 2)
        except (RayError, RayServeException, asyncio.TimeoutError) as error:
            if not named:
                return None
            if isinstance(error, asyncio.TimeoutError):
                raise
            retry = {"Retry-After": str(RETRY_AFTER_S)}
            raise Refusal(503, f"version {version!r} of {self.name!r} is not ready or too busy", retry) from None

    def copy(self, shadow: Route, handed: Handed | bytes) -> None:
        """Send a copy, without waiting for what comes of it."""
        if len(self._copies) >= MOST_COPIES:
            self._count(shadow.version, "dropped")
            return
        task = asyncio.create_task(self._copy(shadow, handed))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _copy(self, shadow: Route, handed: Handed | bytes) -> None:
        try:
            status, _, _ = await asyncio.wait_for(self._reply(shadow, handed), self.timeout_s)
        except Exception:  # whatever it is, it is the shadow's
            status = 500
        self._count(shadow.version, "failed" if status >= 500 or status == 408 else "answered")

    async def _reply(self, route: Route, handed: Handed | bytes) -> Reply:
        if route.version not in self._handles:  # it asks Ray's controller, and waits
            handle = await asyncio.to_thread(serve.get_deployment_handle, self.name, route.application)
            self._handles[route.version] = handle
        reply: Reply = await self._handles[route.version].answer_handed.remote(handed)
        return reply
