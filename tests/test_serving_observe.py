"""One service that is watched and asked about two things at once: access log, traces and `classify` beside `detect`."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from artifacts import COLOURS, picture, write_classifier, write_detector
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from services import Started, started_of, write_keys

from benchmarks.processes import tree
from serving.client import Client
from serving.config import ServedModel, ServingConfig

KEY = "ann-0123456789abc"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Watched(Started):
    log: Path
    spans: list[dict[str, Any]]

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


class Collector(ThreadingHTTPServer):
    """An OTLP collector on loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), Collect)


class Collect(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in request.resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                said = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
                ids = {"trace": span.trace_id.hex(), "span": span.span_id.hex(), "parent": span.parent_span_id.hex()}
                times = {"began": span.start_time_unix_nano, "ended": span.end_time_unix_nano}
                self.server.spans.append({"name": span.name, "service": service, "said": said} | ids | times)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    classifier = str(write_classifier(folder / "classifier.onnx"))
    config = ServingConfig(
        port=0,
        api_keys=write_keys(folder / "keys", KEY),
        access_log=str(folder / "access.log"),
        models=(
            ServedModel(name="classifier", artifact=classifier, replicas=2),
            ServedModel(name="detector", artifact=str(write_detector(folder / "detector.onnx"))),
            ServedModel(name="lone", artifact=classifier),
        ),
    )
    with pytest.MonkeyPatch.context() as environment, Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        environment.setenv("OTEL_SERVICE_NAME", "pictures")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms
        with started_of(config, **{"X-API-Key": KEY}) as service:
            yield Watched(**vars(service), log=folder / "access.log", spans=collector.spans)
        collector.shutdown()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_one_request_equals_two(watched: Watched, kind: str) -> None:
    for colour in COLOURS:
        image = picture(colour, (301, 187), kind)
        both = watched.post("detector/detect?classify=classifier&top_k=2&score_threshold=0.55", image)
        assert both.status_code == 200, both.text
        found = both.json()
        assert found.pop("classification") == watched.post("classifier/classify?top_k=2", image).json()
        assert found == watched.post("detector/detect?score_threshold=0.55", image).json()


def test_one_request_of_several_pictures(watched: Watched) -> None:
    files = [("image", (colour, picture(colour))) for colour in COLOURS] + [("image", ("bad", b"bad"))]
    results = watched.http.post("/v2/models/detector/detect?classify=classifier", files=files).json()["results"]
    assert [row["classification"]["predictions"][0]["label"] for row in results[:3]] == list(COLOURS)
    assert [len(row["detections"]) for row in results[:3]] == [2, 2, 2]
    assert "cannot be decoded" in results[3]["error"]


def test_the_client_asks_for_both(watched: Watched) -> None:
    with Client(watched.service.url, api_key=KEY) as client, ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda i: client.detect("detector", picture(COLOURS[i % 3]), classify="classifier"), range(60))
        )
    assert [answer["classification"]["predictions"][0]["label"] for answer in answers] == list(COLOURS) * 20


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("classify=none", 404, "no model 'none' here"),
        ("classify=_front", 404, "no model '_front' here"),
        ("classify=", 404, "no model ''"),
        ("classify=detector", 400, "classify names a classifier"),
        ("classify=classifier&top_k=0", 400, "top_k='0'"),
        ("classify=classifier&annotate=png", 400, "leave out annotate or classify"),
        ("top_k=3", 400, "classify=NAME"),
    ],
)
def test_what_cannot_be_asked_for(watched: Watched, query: str, status: int, words: str) -> None:
    response = watched.post(f"detector/detect?{query}", picture("red"))
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"] and words in response.json()["error"]


def test_every_answer_has_its_id_and_line(watched: Watched) -> None:
    asked = {
        "good": ("detector/detect", picture("red"), {}, 200),
        "nobody": ("detector/detect?key=secret", b"x", {"X-API-Key": "secret-0123456789"}, 401),
        "broken": ("classifier/classify", b"broken", {}, 422),
        "lost": ("nothing/classify", b"x", {}, 404),
    }
    for name, (path, body, headers, status) in asked.items():
        response = watched.post(path, body, headers={"X-Request-ID": name, **headers})
        assert (response.status_code, response.headers.get_list("x-request-id")) == (status, [name])
    fresh = watched.http.get("/v2/health/live", headers={"X-Request-ID": "not sane"})
    (found,) = fresh.headers.get_list("x-request-id")
    assert re.fullmatch("[0-9a-f]{32}", found)

    deadline = time.monotonic() + 10
    while not {*asked, found} <= {line["request_id"] for line in watched.logged()}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lines = {line["request_id"]: line for line in watched.logged()}
    for name, (path, body, _, status) in asked.items():
        line = lines[name]
        assert (line["method"], line["status"]) == ("POST", status)
        assert line["path"] == f"/v2/models/{path.partition('?')[0]}"
        assert line.get("key") == (None if name == "nobody" else "ann")
        if status in (200, 422):
            assert line["bytes_in"] == len(body) and line["ms"] > 0
    assert lines["lost"]["model"] == "nothing"
    assert "secret" not in watched.log.read_text() and KEY not in watched.log.read_text()


def test_a_trace_goes_on_with_its_stages(watched: Watched) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "traced"}
    assert watched.post("detector/detect", picture("green"), headers=headers).status_code == 200
    deadline = time.monotonic() + 10
    while not any(span["name"] == "POST detect" and span["trace"] == TRACE for span in watched.spans):
        assert time.monotonic() < deadline, watched.spans
        time.sleep(0.05)
    time.sleep(0.3)  # the last of its children may be in another export
    spans = {span["name"]: span for span in watched.spans if span["trace"] == TRACE}
    request = spans.pop("POST detect")
    assert request["parent"] == PARENT and request["service"] == "pictures"
    assert request["said"] == {
        "http.request.method": "POST",
        "url.path": "/v2/models/detector/detect",
        "http.response.status_code": 200,
        "cspnet.model": "detector",
        "cspnet.request_id": "traced",
    }
    assert list(sorted(spans, key=lambda name: spans[name]["began"])) == ["decode", "queue", "run", "encode"]
    for span in spans.values():
        assert span["parent"] == request["span"]
        assert request["began"] - 1_000_000 <= span["began"] <= span["ended"] <= request["ended"] + 1_000_000  # ns


def test_503_without_a_replica(watched: Watched) -> None:
    """The last test of this file: it kills one, which Ray starts again."""
    both = "detector/detect?classify=lone"
    assert watched.post(both, picture("red")).status_code == 200
    os.kill(pid_of("ray::ServeReplica:lone:lone"), signal.SIGKILL)
    began = time.monotonic()
    response = watched.post(both, picture("red"))
    assert response.status_code == 503 and "'lone' " in response.json()["error"], response.text
    assert response.headers["retry-after"] == "1"
    assert time.monotonic() - began < 10
    assert watched.post("detector/detect", picture("red")).status_code == 200
    with Client(watched.service.url, api_key=KEY, tries=30) as client:
        assert client.detect("detector", picture("blue"), classify="lone")["classification"]["model"] == "colours"


def pid_of(title: str) -> int:
    """The process of that title below this one: others may run services beside."""
    (pid,) = [process.pid for process in tree(os.getpid()) if process.command().startswith(title)]
    return pid
