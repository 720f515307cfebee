"""OpenTelemetry traces of a replica's requests, where the environment asks for them; no Ray, no torch here.

A span an HTTP request continues the client's trace, and has a child for each stage of each image. The OTEL_* variables
of the OpenTelemetry specification say where spans go, under which name, and how many. OpenTelemetry is imported if they
do.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from starlette.requests import Request

from backbones.errors import InputError

ASKED_BY = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_stages: ContextVar[list[tuple[str, float, float]] | None] = ContextVar("stages", default=None)


def stage(name: str, began: float, ended: float) -> None:
    """Note a stage of the request that this context belongs to; seconds of `time.perf_counter`."""
    stages = _stages.get()
    if stages is not None:
        stages.append((name, began, ended))


class Traces:
    """Spans of requests, or none.

    Args:
        tracer: OpenTelemetry's; None where there are no traces.
    """

    def __init__(self, tracer: Any = None):
        self._tracer = tracer

    @contextmanager
    def request(self, request: Request, action: str, model: str) -> Iterator[dict[str, int]]:
        """A request's span; whoever answers puts its `status` into what is yielded."""
        said: dict[str, int] = {}
        if self._tracer is None:
            yield said
            return
        from opentelemetry import propagate, trace

        attributes = {
            "http.request.method": request.method,
            "url.path": request.url.path,
            "cspnet.model": model,
            "cspnet.request_id": request.headers.get("x-request-id", ""),
        }
        parent = propagate.extract(request.headers)
        span = self._tracer.start_span(f"{request.method} {action}", parent, trace.SpanKind.SERVER, attributes)
        stages: list[tuple[str, float, float]] = []
        token = _stages.set(stages if span.is_recording() else None)
        try:
            yield said
        finally:
            _stages.reset(token)
            self._end(span, stages, said.get("status", 499))

    def _end(self, span: Any, stages: list[tuple[str, float, float]], status: int) -> None:
        from opentelemetry import trace

        epoch_ns = time.time_ns() - time.perf_counter_ns()
        context = trace.set_span_in_context(span)
        for name, began, ended in stages:
            child = self._tracer.start_span(name, context, start_time=epoch_ns + int(began * 1e9))
            child.end(epoch_ns + int(ended * 1e9))
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        span.end()


def from_environment() -> Traces:
    """Traces as OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME and their like ask for them; none without the first.

    Raises:
        InputError: they are asked for, and the packages are not there.
    """
    asked = next((name for name in ASKED_BY if os.environ.get(name)), None)
    if asked is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Traces()
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return Traces()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InputError(f"{asked} asks for traces: pip install 'cspnet[otel]', or unset it") from None
    resource = Resource({"service.name": "cspnet"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider.get_tracer("cspnet"))
