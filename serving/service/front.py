"""What is said about the whole service: its page, documents, health and index, over HTTP and gRPC; no torch here."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.schema import ApplicationStatusOverview
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from serving.api import oip, oip_grpc, openapi
from serving.api.oip_json import parse_index
from serving.api.protocol import RETRY_AFTER_S, Refusal, allow, read_whole_body, refused, respond
from serving.service import grpc_service

STATUS_TIMEOUT_S = 10.0
MOST_INDEX_BYTES = 10_000  # of a request for the index
PAGE_HEADERS = {  # the page has its own policy; this is what it cannot say itself
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Entry:
    """A version of a model in the repository's index; `answers` is whether requests that name none come to it."""

    name: str
    version: str
    task: str
    application: str
    answers: bool


class Front:
    """The application that is no model."""

    def __init__(self, entries: Sequence[Entry]):
        self.entries = entries
        self.states: dict[str, str] = {}  # by application, when Ray last told
        self.page = Path(__file__).with_name("page.html").read_bytes()
        self.document = openapi.document(version("cspnet"))
        self.about = {"name": "cspnet", "version": version("cspnet"), "extensions": oip.EXTENSIONS}

    async def __call__(self, request: Request) -> Response:
        return await respond(self._answer, request, STATUS_TIMEOUT_S)

    async def _answer(self, request: Request) -> Any:
        path = request.url.path.rstrip("/")
        if not path:
            allow(request, "GET", "HEAD")
            return HTMLResponse(self.page, headers=PAGE_HEADERS)
        if path in ("/docs", "/openapi.json"):
            allow(request, "GET", "HEAD")
            if path == "/docs":
                return HTMLResponse(openapi.page(self.document), headers=PAGE_HEADERS)
            return self.document
        if path == "/v2":
            allow(request, "GET", "HEAD")
            return self.about
        if path == "/v2/health/live":
            allow(request, "GET", "HEAD")
            return {"live": True}
        if path == "/v2/health/ready":
            allow(request, "GET", "HEAD")
            waiting = await self._waiting()
            if waiting:
                raise Refusal(503, f"not ready: {', '.join(waiting)}", {"Retry-After": str(RETRY_AFTER_S)})
            return {"ready": True}
        if path == "/v2/repository/index":
            allow(request, "POST")
            body = await read_whole_body(request, MOST_INDEX_BYTES, 'only {"ready": true} has a meaning here')
            with refused():
                asked = parse_index(body)
            return await self._index(asked.ready)
        if path.startswith("/v2/models/"):
            name, names = path.split("/")[3], sorted({entry.name for entry in self.entries})
            raise Refusal(404, f"no model {name!r} here: there are {', '.join(names)}")
        raise Refusal(404, f"nothing at {request.url.path}: see GET /v2, /v2/health/ready, POST /v2/repository/index")

    # By gRPC's names: Ray calls them with a message's bytes.

    async def ServerLive(self, request: bytes, grpc_context: Any) -> Any:
        return oip_grpc.MESSAGES["ServerLiveResponse"](live=True)

    async def ServerReady(self, request: bytes, grpc_context: Any) -> Any:
        async def ready() -> dict[str, Any]:
            return {"ready": not await self._waiting()}

        return (await grpc_service.answer("ServerReady", ready(), grpc_context, STATUS_TIMEOUT_S))[0]

    async def ServerMetadata(self, request: bytes, grpc_context: Any) -> Any:
        return oip_grpc.MESSAGES["ServerMetadataResponse"](**self.about)

    async def RepositoryIndex(self, request: bytes, grpc_context: Any) -> Any:
        async def models() -> dict[str, Any]:
            with refused():
                asked = oip_grpc.read("RepositoryIndexRequest", request)
            rows = await self._index(asked.ready)
            return {"models": [{k: v for k, v in model.items() if k != "task"} for model in rows]}

        return (await grpc_service.answer("RepositoryIndex", models(), grpc_context, STATUS_TIMEOUT_S))[0]

    async def _waiting(self) -> list[str]:
        states = zip(self.entries, await self._index(), strict=True)
        return [entry.application for entry, row in states if entry.answers and row["state"] != "READY"]

    async def _index(self, ready: bool = False) -> list[dict[str, str]]:
        """A row a version; with `ready` of those alone that are."""
        applications = (await asyncio.to_thread(serve.status)).applications
        # While one is built anew, or if that fails, Ray lists none of its deployments; they go on as they were.
        told = {name: _state(a) for name, a in applications.items() if a.deployments or name not in self.states}
        self.states = {name: state for name, state in self.states.items() if name in applications} | told
        rows = [(entry, self.states.get(entry.application, "NOT_STARTED")) for entry in self.entries]
        index = [
            {
                "name": entry.name,
                "version": entry.version,
                "state": "READY" if state == "RUNNING" else "UNAVAILABLE",
                "reason": "" if state == "RUNNING" else state,
                "task": entry.task,
            }
            for entry, state in rows
        ]
        return [row for row in index if row["state"] == "READY"] if ready else index


def _state(application: ApplicationStatusOverview) -> str:
    """RUNNING as long as each deployment has a replica that does, such as while new ones replace them."""
    replicas: list[Mapping[Any, int]] = [deployment.replica_states for deployment in application.deployments.values()]
    if replicas and all(states.get("RUNNING") for states in replicas):
        return "RUNNING"
    return str(application.status.value)
