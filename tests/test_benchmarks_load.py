"""The load that servers are measured under, and what every peer does with a picture."""

import importlib
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import load
from benchmarks.load import Post
from benchmarks.serving import jpeg, write_nothing
from serving.predictor import create_predictor
from serving.runtime import OnnxModel

ROOT = Path(__file__).parents[1]


class Answer(BaseHTTPRequestHandler):
    """200 to a body that begins as JPEG does, but under /wrong; else 500; later under /slow."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        right = (
            self.path in ("/right", "/slow")
            and body[:2] == b"\xff\xd8"
            and self.headers["Content-Type"] == "image/jpeg"
        )
        if self.path == "/slow":
            time.sleep(0.6)
        self.send_response(200 if right else 500)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "name", ["_own", pytest.param("_wrk", marks=pytest.mark.skipif(not shutil.which("wrk"), reason="no wrk"))]
)
def test_answers_and_errors_are_counted(url: str, tmp_path: Path, name: str) -> None:
    picture = jpeg(tmp_path / "a.jpg", 64, 48)
    send = getattr(load, name)
    right, wrong = (send(Post(f"{url}/{path}", picture), 3, 1) for path in ("right", "wrong"))
    assert right["requests"] > 10 and right["errors"] == 0
    assert 0 < right["p50_ms"] <= right["p99_ms"] < 1000
    assert wrong["errors"] == wrong["requests"] > 10
    slow = send(Post(f"{url}/slow", picture), 2, 2)
    assert 2 <= slow["requests"] <= 2 * 3 and slow["errors"] == 0  # and not those that end after the two seconds
    assert slow["p50_ms"] >= 600 and slow["seconds"] == pytest.approx(2, abs=0.5)


def test_a_peer_does_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_nothing(tmp_path / "m.onnx")
    predictor: Any = create_predictor(OnnxModel(path, "cpu"))
    preprocess = predictor.metadata.preprocess
    for name, value in (
        ("MODEL", path), ("RESIZE", preprocess.resize), ("CROP", preprocess.crop), ("CORES", 1),
        ("INTERPOLATION", preprocess.interpolation),
    ):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    peer = importlib.import_module("picture")
    picture = jpeg(tmp_path / "a.jpg", 64, 48).read_bytes()
    (answer,) = peer.Model(1).top5([peer.prepare(picture)])
    (expected,) = predictor.predict([predictor.prepare(picture)])
    assert [row["index"] for row in answer["predictions"]] == expected.indices.tolist()
    scores = [row["score"] for row in answer["predictions"]]
    # It rounds the resized size in another way.
    np.testing.assert_allclose(scores, expected.probabilities, atol=1e-3)
