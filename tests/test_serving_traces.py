"""A request's span and its stages, kept in memory; and nothing at all where nobody asks for them."""

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode
from starlette.requests import Request

from backbones.errors import InputError
from serving.service import traces
from serving.service.batching import BatchQueue
from serving.service.traces import ASKED_BY, Traces


def request(**headers: str) -> Request:
    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/v2/models/m/detect", "headers": named})


async def serve(kept: Traces, status: int | None, images: int = 1) -> None:
    """As a replica does: images through a thread, and then through a batch."""

    def run(items: Sequence[int]) -> Sequence[int]:
        return items

    queue = BatchQueue(run, max_batch_size=8)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor() as pool, kept.request(request(), "detect", "m") as said:
        for i in range(images):
            await loop.run_in_executor(pool, copy_context().run, traces.stage, "decode", float(i), i + 0.5)
        assert await asyncio.gather(*map(queue.submit, range(images))) == list(range(images))
        if status is not None:
            said["status"] = status
    await queue.close()


def spans(status: int | None, images: int = 1, **options: Any) -> list[ReadableSpan]:
    memory, provider = InMemorySpanExporter(), TracerProvider(**options)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    asyncio.run(serve(Traces(provider.get_tracer("test")), status, images))
    return list(memory.get_finished_spans())


def test_every_image_has_its_stages() -> None:
    *stages, whole = spans(200, images=3)
    assert whole.name == "POST detect" and whole.attributes is not None and whole.status.status_code is StatusCode.UNSET
    assert whole.attributes["http.response.status_code"] == 200 and whole.context is not None
    assert sorted(span.name for span in stages) == ["decode"] * 3 + ["queue"] * 3 + ["run"] * 3
    assert {span.parent.span_id for span in stages if span.parent} == {whole.context.span_id}
    assert {span.end_time - span.start_time for span in stages if span.name == "decode"} == {500_000_000}  # type: ignore[operator]


@pytest.mark.parametrize(("status", "said", "code"), [(503, 503, StatusCode.ERROR), (None, 499, StatusCode.UNSET)])
def test_what_failed_and_who_left(status: int | None, said: int, code: StatusCode) -> None:
    whole = spans(status)[-1]
    assert whole.attributes is not None and whole.attributes["http.response.status_code"] == said
    assert whole.status.status_code is code


def test_a_request_that_is_not_sampled_notes_nothing() -> None:
    assert spans(200, sampler=ALWAYS_OFF) == []


def test_without_traces_nothing_is_noted_or_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ASKED_BY:
        monkeypatch.delenv(name, raising=False)
    asyncio.run(serve(traces.from_environment(), 200))
    assert traces._stages.get() is None
    code = (
        "import sys; from serving.service import traces; traces.from_environment(); "
        "sys.exit('opentelemetry' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_traces_without_their_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InputError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces: pip install 'cspnet\[otel\]'"):
        traces.from_environment()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    traces.from_environment()
