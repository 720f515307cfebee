"""A model's replicas on Ray Serve: a thin shell round `service/endpoints.py`; no torch here.

Replicas of a model, or of each of its versions, decode and run, so that a body crosses one process.
`service/applications.py` makes Ray's applications of them.
"""

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

from PIL import Image
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from backbones.errors import InputError
from backbones.preprocess import ClassifierPreprocess, Pixels
from serving import selftest
from serving.api import oip, oip_grpc, oip_json
from serving.api.protocol import JsonErrors, Refusal, allow, attempt, read_body, refused, respond, too_large
from serving.api.schemas import ClassifyAnswer
from serving.artifact import Artifact, DetectorArtifact
from serving.ingress import access_log, keys
from serving.predictor import create_predictor
from serving.runtime import OnnxModel, Provider, SideBySide, usable_cores
from serving.service import grpc_service, traces
from serving.service.endpoints import Endpoints
from serving.service.metrics import CountRefusals, ReplicaMetrics
from serving.service.versions import HEADER, Handed, Reply, Route, Versions, hand, read_path, route_prefix
from serving.sessions.providers import NAMES

PROBE_TIMEOUT_S = 20.0  # Ray gives a health check 30
LONG_RUN_S = 0.005  # of an image on all cores; what is shorter gains more from batches than from a core for each
ENDPOINTS = {"classification": "classify", "detection": "detect"}
ACTIONS = (*ENDPOINTS.values(), "infer", "ready")  # what metrics tell apart


class ModelReplica:
    """One artefact behind HTTP and gRPC. Its constructor runs the smallest and the largest batch, so that ready means
    warm, and one known image, which must be answered right; with CUDA graphs all sizes between, each of which is
    recorded.
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
        predictor: Any = create_predictor(self.model)
        self.endpoint = ENDPOINTS[self.model.metadata.task]
        self.probe = predictor.prepare(_blank_image())
        workers, cores = 1, threads or usable_cores()
        if self.model.provider == NAMES["cpu"] and cores > 1 and _takes_long(self.model, self.probe):
            # Batches would only make each image wait: of operators that take long, nothing is saved by more at once.
            narrow = OnnxModel(artifact, "cpu", 1)
            _warm(narrow, self.probe, {1})
            predictor = create_predictor(SideBySide(self.model, narrow))
            workers, max_batch_size = cores, 1
        _warm(self.model, self.probe, range(1, max_batch_size + 1) if cuda_graphs else {1, max_batch_size})
        self.traces = traces.from_environment()
        self.metrics = ReplicaMetrics(self.model.provider)
        self.version_names = [route.version for route in routes]
        self.versions = Versions(name, version, routes, timeout_s, self.metrics.copied)
        self.endpoints = Endpoints(name, predictor, self.metrics, max_batch_size, max_body_bytes, workers)
        self.batches = self.endpoints.batches
        await self.batches.submit(self.probe)  # a GPU keeps handles a thread: warm that one too
        self.batches_seen = self.batches.batches

    async def check_health(self) -> None:
        """Images that were answered since the last check prove as much as a probe behind them in the queue, if no
        batch beside them hangs.
        """
        if self.batches.longest_run_s() > PROBE_TIMEOUT_S:
            raise TimeoutError(f"a batch has been running for more than {PROBE_TIMEOUT_S:g} s")
        if self.batches.batches == self.batches_seen:
            await asyncio.wait_for(self.batches.submit(self.probe), PROBE_TIMEOUT_S)
        self.batches_seen = self.batches.batches

    # For other replicas.

    async def artifact(self) -> Artifact:
        """What the model's artefact says."""
        return self.model.metadata

    async def classify_pixels(
        self, pixels: Pixels, preprocess: ClassifierPreprocess, top_k: int
    ) -> ClassifyAnswer | None:
        """As `Endpoints.classify_pixels`."""
        return await self.endpoints.classify_pixels(pixels, preprocess, top_k)

    async def answer_handed(self, handed: Handed | bytes) -> Reply:
        """The answer to a request that another version's replica was asked; of gRPC a ModelInferRequest's bytes."""
        if isinstance(handed, bytes):
            answered = await attempt(self._infer_here(handed), self.timeout_s, "ModelInfer")
            self.metrics.answered("infer", answered.status if isinstance(answered, Refusal) else 200)
            if isinstance(answered, Refusal):
                return answered.status, [], answered.message.encode()
            return 200, [], answered.SerializeToString()
        response = await self._respond(self._answer, handed.request())
        return response.status_code, response.raw_headers, bytes(response.body)

    # HTTP.

    async def __call__(self, request: Request) -> Response:
        asked, action = read_path(request.url.path, self.name)
        infers = bool(action) and request.method == "POST"
        version = self.versions.choose(asked, infers)
        shadows = self.versions.shadows(asked, infers)
        if version == self.version and not shadows:
            return await self._respond(self._answer, request)
        return await self._respond(partial(self._hand_on, version, shadows), request)

    async def _respond(self, handler: Callable[[Request], Awaitable[Any]], request: Request) -> Response:
        action = request.url.path.rsplit("/", 1)[-1]
        action = action if action in ACTIONS else "other"
        with self.traces.request(request, action, self.name) as said:
            response = await respond(handler, request, self.timeout_s)
            said["status"] = response.status_code
        if HEADER not in response.headers:  # no other version's, which counts it itself
            response.headers[HEADER] = self.version
            self.metrics.answered(action, response.status_code)
        return response

    async def _hand_on(self, version: str, shadows: Sequence[Route], request: Request) -> Any:
        handed = await hand(request, self.max_body_bytes)
        for shadow in shadows:
            self.versions.copy(shadow, handed)
        named = read_path(request.url.path, self.name)[0] is not None
        reply = await self.versions.ask(version, handed, named) if version != self.version else None
        if reply is None:
            return await self._answer(handed.request())
        status, headers, body = reply
        response = Response(body, status)
        response.raw_headers = headers
        return response

    async def _answer(self, request: Request) -> Any:
        path = route_prefix(self.name)
        asked, action = read_path(request.url.path, self.name)
        self._check_version(asked)
        if not action:
            allow(request, "GET", "HEAD")
            return self._describe()
        if action == "ready":
            allow(request, "GET", "HEAD")
            return {"name": self.name, "ready": True}  # a replica that answers is warm
        if action == "infer":
            allow(request, "POST")
            body = await read_body(request, self.max_body_bytes, "an inference request, as JSON")
            length = request.headers.get(oip_json.JSON_LENGTH)
            parse = partial(oip_json.parse, body, length)
            content, headers = await self.endpoints.infer(parse, oip_json.render, self.version)
            return Response(content, headers=headers)
        if action not in ENDPOINTS.values():
            raise Refusal(404, f"no {action!r} here: GET {path}, or POST …/{self.endpoint} an image")
        allow(request, "POST")
        if action != self.endpoint:
            task, path = self.model.metadata.task, f"{path}/{self.endpoint}"
            raise Refusal(400, f"{self.name!r} is a model for {task}: POST to {path}")
        return await self.endpoints.find(request)

    def _check_version(self, asked: str | None) -> None:
        if asked not in (None, self.version):
            raise Refusal(404, f"no version {asked!r} of {self.name!r} here: there is {', '.join(self.version_names)}")

    # gRPC, by its names: Ray calls them with a message's bytes.

    async def ModelReady(self, request: bytes, grpc_context: Any) -> Any:
        return await self._answer_grpc("ModelReady", "ready", self._about("/ready", request), grpc_context)

    async def ModelMetadata(self, request: bytes, grpc_context: Any) -> Any:
        return await self._answer_grpc("ModelMetadata", "other", self._about("", request), grpc_context)

    async def ModelInfer(self, request: bytes, grpc_context: Any) -> Any:
        return await self._answer_grpc("ModelInfer", "infer", self._infer(request), grpc_context)

    async def _answer_grpc(self, method: str, action: str, work: Awaitable[Any], context: Any) -> Any:
        answer, status = await grpc_service.answer(method, work, context, self.timeout_s)
        self.metrics.answered(action, status)
        return answer

    async def _about(self, path: str, request: bytes) -> Any:
        """What HTTP answers at this path of the version that is asked for."""
        with refused():
            asked = oip_grpc.read("ModelReadyRequest", request).version  # all such have the same fields
        handed = Handed("GET", route_prefix(self.name) + (f"/versions/{asked}" if asked else "") + path, b"", [], b"")
        version = self.versions.choose(asked or None, infers=False)
        if version == self.version:
            return await self._answer(handed.request())
        return json.loads(_content(await self.versions.ask(version, handed, named=True)))

    async def _infer(self, request: bytes) -> Any:
        if len(request) > self.max_body_bytes:
            raise too_large(self.max_body_bytes)
        with refused():
            asked = oip_grpc.read("ModelInferRequest", request).model_version or None
        version = self.versions.choose(asked, infers=True)
        for shadow in self.versions.shadows(asked, infers=True):
            self.versions.copy(shadow, request)
        reply = await self.versions.ask(version, request, asked is not None) if version != self.version else None
        if reply is None:
            return await self._infer_here(request, asked)
        return oip_grpc.read("ModelInferResponse", _content(reply))

    async def _infer_here(self, request: bytes, asked: str | None = None) -> Any:
        self._check_version(asked)
        return await self.endpoints.infer(partial(oip_grpc.parse, request), oip_grpc.render, self.version)

    def _describe(self) -> dict[str, Any]:
        metadata = self.model.metadata
        return {
            "name": self.name,
            "versions": self.version_names,
            "platform": oip.PLATFORM,
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


def _content(reply: Reply | None) -> bytes:
    """A reply's body, if it is an answer.

    Raises:
        Refusal: it is none.
    """
    assert reply is not None, "a version that is asked by its name answers or is refused"
    status, _, content = reply
    if status != 200:
        message = json.loads(content)["error"] if content.startswith(b"{") else content.decode()
        raise Refusal(status, message)
    return content


def middlewares() -> list[Middleware]:
    """What Ray puts round every HTTP server of the service; `service/environment.py` names it to Ray."""
    inner = [Middleware(JsonErrors), *keys.from_environment()]
    return [*inner, Middleware(CountRefusals), access_log.from_environment()]  # the last is outermost


def _warm(model: OnnxModel, probe: Any, sizes: Iterable[int]) -> None:
    """Run batches of these sizes, and hold the model to its known answer."""
    predictor: Any = create_predictor(model)
    for size in sizes:
        predictor.predict([probe] * size)
    selftest.check(model)


def _takes_long(model: OnnxModel, probe: Any) -> bool:
    """Whether a lone image does, each time: what else the machine does makes a short run long, but none shorter."""
    predictor: Any = create_predictor(model)

    def run_s() -> float:
        began = time.perf_counter()
        predictor.predict([probe])
        return time.perf_counter() - began

    return all(run_s() > LONG_RUN_S for _ in range(3))


def _blank_image() -> bytes:
    """A gray picture, the least that goes the whole way."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()
