"""A service on a real Ray Serve, which a file's tests share, and what is asked of it."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from artifacts import write_slow_classifier

from serving.config import ServedModel, ServingConfig
from serving.serve import RunningService, start


@dataclass
class Started:
    service: RunningService
    http: httpx.Client
    lines: list[str]  # what it said as it started

    def post(self, path: str, body: bytes, **kwargs: object) -> httpx.Response:
        return self.http.post(f"/v2/models/{path}", content=body, **kwargs)  # type: ignore[arg-type]

    def prometheus(self) -> str:
        """The text of its metrics."""
        (url,) = re.findall(r"Prometheus at (\S+)", "\n".join(self.lines))
        return httpx.get(url, trust_env=False).text


@contextmanager
def started_of(config: ServingConfig, **headers: str) -> Iterator[Started]:
    lines: list[str] = []
    with (
        start(config, lines.append) as service,
        httpx.Client(base_url=service.url, headers=headers, timeout=60) as http,
    ):
        yield Started(service, http, lines)


def slow_model(folder: Path, seconds: float, timeout_s: float) -> ServedModel:
    """One that takes about so long for an image, and lets one wait."""
    return ServedModel(
        name="slow",
        artifact=str(write_slow_classifier(folder / "slow.onnx", seconds)),
        max_batch_size=1,
        max_ongoing_requests=1,
        max_queued_requests=1,
        timeout_s=timeout_s,
    )


def write_keys(path: Path, key: str) -> str:
    """The path of a file with one client's key, which nobody else may read."""
    path.write_text(f"ann:{key}\n")
    path.chmod(0o600)
    return str(path)


def within(seconds: float, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.5)
