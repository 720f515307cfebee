"""What a replica counts and times, as Ray's metrics, which Prometheus reads from each node; no torch here.

Ray puts `ray_` before a name and tells deployment, replica and application in its tags.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.service import traces
from serving.service.versions import HEADER, route_prefix

Stage = Literal["decode", "queue", "run", "encode"]  # bytes to pixels; for a batch's turn; the batch; results to bytes
T = TypeVar("T")
_OF_MODELS = route_prefix("")
_ANSWERED = HEADER.lower().encode()  # a header that every handler's answer has
_SECONDS: list[float] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
_IMAGES: list[float] = [1, 2, 4, 8, 16, 32, 64, 128]


class CountRefusals:
    """ASGI middleware: counts the answers under /v2/models/ that no replica's handler has given, by status: of a full
    queue, to who has no key or asks too often, about a model that is not there.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self._refused = Counter("cspnet_refused", "Requests refused before a model heard of them", ("code",))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_OF_MODELS):
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and not any(
                name.lower() == _ANSWERED for name, _ in message.get("headers", ())
            ):
                self._refused.inc(1, {"code": str(message["status"])})
            await send(message)

        await self.app(scope, receive, answer)


class ReplicaMetrics:
    """The metrics of one replica. Threads may share it.

    Args:
        provider: on which its session runs.
    """

    def __init__(self, provider: str) -> None:
        tags: Any = ("action", "code")  # Ray's annotation allows for one
        copies: Any = ("version", "outcome")
        self._requests = Counter("cspnet_requests", "Requests that were answered, by action and HTTP status", tags)
        self._stages = Histogram(
            "cspnet_stage_seconds", "Seconds of an image in a stage; run is a batch's", _SECONDS, ("stage",)
        )
        self._batches = Histogram("cspnet_batch_images", "Images of a batch", _IMAGES)
        self._waiting = Gauge("cspnet_waiting_images", "Images that wait for a batch as one begins")
        self._replica = Gauge("cspnet_replica", "1, by provider", ("provider",))
        self._replica.set(1, {"provider": provider})
        self._copies = Counter("cspnet_shadow_copies", "Copies for shadows, by what came of them", copies)

    def answered(self, action: str, status: int) -> None:
        """A request, whatever its answer."""
        self._requests.inc(1, {"action": action, "code": str(status)})

    def copied(self, version: str, outcome: str) -> None:
        """A request that a shadow was to get a copy of: answered, failed or dropped."""
        self._copies.inc(1, {"version": version, "outcome": outcome})

    def call(self, stage: Stage, work: Callable[..., T], *args: object) -> T:
        """What `work` returns, timed unless it fails."""
        began = time.perf_counter()
        result = work(*args)
        ended = time.perf_counter()
        self._stages.observe(ended - began, {"stage": stage})
        traces.stage(stage, began, ended)
        return result

    def batch(self, waited_s: Sequence[float], run_s: float, waiting: int) -> None:
        """A batch that was run.

        Args:
            waited_s: seconds of each of its images before it.
            run_s: seconds of the batch.
            waiting: images left for the next.
        """
        self._batches.observe(len(waited_s))
        self._waiting.set(waiting)
        self._stages.observe(run_s, {"stage": "run"})
        for seconds in waited_s:
            self._stages.observe(seconds, {"stage": "queue"})
