"""Ray Serve's deployments: a thin shell round `predictor.py`; no torch here.

Replicas of a model, or of each of its versions, decode and run, so that a body crosses one process; a small one in
front at `/` knows all of them. `applications.py` makes Ray's applications of them.
"""

import asyncio
import io
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

from PIL import Image
from ray import serve
from ray.serve.schema import ApplicationStatusOverview
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from backbones.errors import InputError, unknown
from backbones.preprocess import ImageError, decode
from detection.drawing import COLORS, draw_boxes
from serving import keys, oip, openapi, selftest
from serving.artifact import Artifact, ClassifierArtifact, DetectorArtifact
from serving.batching import BatchQueue
from serving.metrics import ReplicaMetrics
from serving.predictor import create_predictor
from serving.protocol import RETRY_AFTER_S, JsonErrors, Refusal, allow, number, read_body, read_query, refused, respond
from serving.runtime import OnnxModel, Provider, usable_cores
from serving.schemas import DEFAULT_TOP_K, DetectAnswer, class_indices, classify_answer, detect_answer
from serving.uploads import read_upload
from serving.versions import HEADER, Handed, Route, Versions, hand, read_path, route_prefix

MAX_TOP_K = 100_000
PROBE_TIMEOUT_S = 20.0  # Ray gives a health check 30
STATUS_TIMEOUT_S = 10.0
ENDPOINTS = {"classification": "classify", "detection": "detect"}
ACTIONS = (*ENDPOINTS.values(), "infer", "ready")  # what metrics tell apart
PICTURES = ("png", "jpeg")  # formats of `annotate`
PAGE_HEADERS = {  # the page has its own policy; this is what it cannot say itself
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
T = TypeVar("T")


class ModelReplica:
    """One artefact behind HTTP. Its constructor runs the smallest and the largest batch, so that ready means warm, and
    one known image, which must be answered right; with CUDA graphs all sizes between, each of which is recorded.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        name: str,
        version: str,
        routes: Sequence[Route],
        artifact: str,
        sha256: str,
        provider: Provider,
        gpu_mem_limit: int | None,
        cuda_graphs: bool,
        threads: int | None,
        max_batch_size: int,
        timeout_s: float,
        max_body_bytes: int,
    ) -> None:
        self.name, self.version, self.timeout_s, self.max_body_bytes = name, version, timeout_s, max_body_bytes
        self.model = OnnxModel(artifact, provider, threads, cuda_graphs=cuda_graphs, gpu_mem_limit=gpu_mem_limit)
        if self.model.sha256 != sha256:  # replicas of one version would give several answers
            raise InputError(f"{artifact} is another file than the one that was checked: deploy it to serve it")
        self.predictor = cast(Any, create_predictor(self.model))  # what one prepares, the other does not take
        self.endpoint = ENDPOINTS[self.model.metadata.task]
        self.decoders = ThreadPoolExecutor(usable_cores(), thread_name_prefix="decode")
        self.probe = self.predictor.prepare(_blank_image())
        for size in range(1, max_batch_size + 1) if cuda_graphs else {1, max_batch_size}:
            self.predictor.predict([self.probe] * size)
        selftest.check(self.model)
        self.metrics = ReplicaMetrics(self.model.provider)
        self.version_names = [route.version for route in routes]
        self.versions = Versions(name, version, routes, timeout_s, self.metrics.copied)
        self.batches: BatchQueue[Any, Any] = BatchQueue(self.predictor.predict, max_batch_size, self.metrics.batch)
        await self.batches.submit(self.probe)  # a GPU keeps handles a thread: warm that one too
        self.batches_seen = self.batches.batches

    async def __call__(self, request: Request) -> Response:
        version, shadows = self.versions.choose(request), self.versions.shadows(request)
        if version == self.version and not shadows:
            return await self._respond(self._answer, request)
        return await self._respond(partial(self._hand_on, version, shadows), request)

    async def answer_handed(self, handed: Handed) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body for a request that another version's replica was asked."""
        response = await self._respond(self._answer, handed.request())
        return response.status_code, response.raw_headers, bytes(response.body)

    async def _respond(self, handler: Callable[[Request], Awaitable[Any]], request: Request) -> Response:
        response = await respond(handler, request, self.timeout_s)
        if HEADER not in response.headers:  # no other version's, which counts it itself
            response.headers[HEADER] = self.version
            action = request.url.path.rsplit("/", 1)[-1]
            self.metrics.answered(action if action in ACTIONS else "other", response.status_code)
        return response

    async def _hand_on(self, version: str, shadows: Sequence[Route], request: Request) -> Any:
        handed = await hand(request, self.max_body_bytes)
        for shadow in shadows:
            self.versions.copy(shadow, handed)
        response = await self.versions.ask(version, handed) if version != self.version else None
        return response or await self._answer(handed.request())

    async def check_health(self) -> None:
        """Images that were answered since the last check prove as much as a probe behind them in the queue."""
        if self.batches.batches == self.batches_seen:
            await asyncio.wait_for(self.batches.submit(self.probe), PROBE_TIMEOUT_S)
        self.batches_seen = self.batches.batches

    async def _answer(self, request: Request) -> Any:
        path = route_prefix(self.name)
        asked, action = read_path(request.url.path, self.name)
        if asked not in (None, self.version):
            raise Refusal(404, f"no version {asked!r} of {self.name!r} here: there is {', '.join(self.version_names)}")
        if not action:
            allow(request, "GET", "HEAD")
            return self._describe()
        if action == "ready":
            allow(request, "GET", "HEAD")
            return {"name": self.name, "ready": True}  # a replica that answers is warm
        if action == "infer":
            allow(request, "POST")
            return await self._infer(request)
        if action not in ENDPOINTS.values():
            raise Refusal(404, f"no {action!r} here: GET {path}, or POST …/{self.endpoint} an image")
        allow(request, "POST")
        if action != self.endpoint:
            task, path = self.model.metadata.task, f"{path}/{self.endpoint}"
            raise Refusal(400, f"{self.name!r} is a model for {task}: POST to {path}")
        return await self._find(request)

    async def _infer(self, request: Request) -> Response:
        """Tensors to tensors, several images at once."""
        body = await read_body(request, self.max_body_bytes, "an inference request, as JSON")
        length = request.headers.get(oip.JSON_LENGTH)
        with refused():
            asked = await self._in_thread(oip.parse, body, length, self.model.metadata)
        prepared = await asyncio.gather(*(self._in_thread(self._prepare, asked, i) for i in range(len(asked.images))))
        results = await asyncio.gather(*map(self.batches.submit, prepared))
        content, headers = await self._in_thread(
            self.metrics.call, "encode", oip.render, asked, self.name, self.version, self.model.metadata, results
        )
        return Response(content, headers=headers)

    def _prepare(self, asked: oip.InferRequest, i: int) -> Any:
        try:
            return self.metrics.call("decode", self.predictor.prepare, asked.images[i])
        except ImageError as error:
            raise ImageError(f"element {i} of {len(asked.images)}: {error}") from None

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Off the event loop, which has no time for it."""
        return await asyncio.get_running_loop().run_in_executor(self.decoders, work, *args)

    async def _find(self, request: Request) -> Any:
        """An image or several to what people read; of several, a bad one is an error in its place."""
        answer, picture = self._read_query(request)
        upload = await read_upload(request, self.max_body_bytes)
        if not upload.several:
            found = await self._one(upload.images[0], answer)
            return await self._in_thread(draw, upload.images[0], found, picture) if picture else found
        if picture:
            raise Refusal(400, f"annotate={picture} answers one picture: send one image at a time")

        async def entry(name: str, image: bytes) -> dict[str, Any]:
            try:
                return {"name": name, **await self._one(image, answer)}
            except ImageError as error:
                return {"name": name, "error": str(error)}

        return {"results": await asyncio.gather(*map(entry, upload.names, upload.images))}

    async def _one(self, image: bytes, answer: Callable[[Any], Any]) -> Any:
        prepared = await self._in_thread(self.metrics.call, "decode", self.predictor.prepare, image)
        found = await self.batches.submit(prepared)
        if getattr(found, "masks", None) is None:
            return self.metrics.call("encode", answer, found)
        return await self._in_thread(self.metrics.call, "encode", answer, found)  # masks are pasted as they are read

    def _read_query(self, request: Request) -> tuple[Callable[[Any], Any], str | None]:
        """What makes an answer of a result, and the format of a picture, if one is to be the answer."""
        metadata = self.model.metadata
        if isinstance(metadata, ClassifierArtifact):
            query = read_query(request, "top_k", "classes")
            top_k = number(query, "top_k", int, 1, MAX_TOP_K) or DEFAULT_TOP_K
            return partial(classify_answer, metadata, top_k=top_k, classes=_classes(query, metadata)), None
        query = read_query(request, "score_threshold", "classes", "annotate")
        # Below the artefact's own threshold there is nothing to return.
        threshold = number(query, "score_threshold", float, metadata.score_threshold, 1)
        picture = query.get("annotate")
        if picture not in (None, *PICTURES):
            raise Refusal(400, str(unknown("value of annotate", picture, PICTURES)))
        classes = _classes(query, metadata)
        return partial(detect_answer, metadata, score_threshold=threshold, classes=classes), picture

    def _describe(self) -> dict[str, Any]:
        metadata = self.model.metadata
        return {
            "name": self.name,
            "versions": self.version_names,
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": oip.INPUT, "datatype": "BYTES", "shape": [-1]}],  # or UINT8 [-1, -1, -1, 3]
            "outputs": [
                {"name": name, "datatype": datatype, "shape": shape}
                for name, (datatype, shape) in oip.output_tensors(metadata).items()
            ],
            "parameters": {
                "task": metadata.task,
                "endpoint": f"{route_prefix(self.name)}/{self.endpoint}",
                "model": metadata.model,
                "provider": self.model.provider,
                "preprocess": str(metadata.preprocess),
                "classes": metadata.classes,
                "score_threshold": metadata.score_threshold if isinstance(metadata, DetectorArtifact) else None,
                "max_body_bytes": self.max_body_bytes,
                "metadata": metadata.model_dump(mode="json"),
            },
        }


def _classes(query: Mapping[str, str], metadata: Artifact) -> tuple[int, ...] | None:
    with refused():
        return class_indices(query["classes"], metadata) if "classes" in query else None


def draw(image: bytes, answer: DetectAnswer, kind: str) -> Response:
    """The upright image with its detections, the best on top."""
    picture, found = decode(image), answer["detections"][::-1]
    texts = [f"{box['label']} {box['score']:.2f}" for box in found]
    colors = [COLORS[box["category_id"] % len(COLORS)] for box in found]
    draw_boxes(picture, [box["box"] for box in found], texts, colors)
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return Response(buffer.getvalue(), media_type=f"image/{kind}")


@dataclass(frozen=True)
class Entry:
    """A version of a model in the repository's index; `answers` is whether requests that name none come to it."""

    name: str
    version: str
    task: str
    application: str
    answers: bool


class Front:
    """What is said about the whole service."""

    def __init__(self, entries: Sequence[Entry]):
        self.entries = entries
        self.states: dict[str, str] = {}  # by application, when Ray last told
        self.page = Path(__file__).with_name("page.html").read_bytes()
        self.document = openapi.document(version("cspnet"))

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
            return {
                "name": "cspnet",
                "version": version("cspnet"),
                "extensions": ["binary_tensor_data", "model_repository"],
            }
        if path == "/v2/health/live":
            allow(request, "GET", "HEAD")
            return {"live": True}
        if path == "/v2/health/ready":
            allow(request, "GET", "HEAD")
            states = zip(self.entries, await self._index(), strict=True)
            waiting = [entry.application for entry, row in states if entry.answers and row["state"] != "READY"]
            if waiting:
                raise Refusal(503, f"not ready: {', '.join(waiting)}", {"Retry-After": str(RETRY_AFTER_S)})
            return {"ready": True}
        if path == "/v2/repository/index":
            allow(request, "POST")
            return await self._index()
        if path.startswith("/v2/models/"):
            name = path.split("/")[3]
            raise Refusal(
                404, f"no model {name!r} here: there are {', '.join(sorted({entry.name for entry in self.entries}))}"
            )
        raise Refusal(404, f"nothing at {request.url.path}: see GET /v2, /v2/health/ready, POST /v2/repository/index")

    async def _index(self) -> list[dict[str, str]]:
        applications = (await asyncio.to_thread(serve.status)).applications
        # While one is built anew, or if that fails, Ray lists none of its deployments; they go on as they were.
        told = {name: _state(a) for name, a in applications.items() if a.deployments or name not in self.states}
        self.states = {name: state for name, state in self.states.items() if name in applications} | told
        rows = [(entry, self.states.get(entry.application, "NOT_STARTED")) for entry in self.entries]
        return [
            {
                "name": entry.name,
                "version": entry.version,
                "state": "READY" if state == "RUNNING" else "UNAVAILABLE",
                "reason": "" if state == "RUNNING" else state,
                "task": entry.task,
            }
            for entry, state in rows
        ]


def _state(application: ApplicationStatusOverview) -> str:
    """RUNNING as long as each deployment has a replica that does, such as while new ones replace them."""
    replicas: list[Mapping[Any, int]] = [deployment.replica_states for deployment in application.deployments.values()]
    if replicas and all(states.get("RUNNING") for states in replicas):
        return "RUNNING"
    return str(application.status.value)


def middlewares() -> list[Middleware]:
    """What Ray puts round every HTTP server of the service; `serve.py` names it to Ray."""
    return [Middleware(JsonErrors), *keys.from_environment()]


def _blank_image() -> bytes:
    """A gray picture, the least that goes the whole way."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()
