"""Load for an HTTP server: one POST again and again from several clients, by wrk, or without it by own processes."""

import http.client
import json
import multiprocessing
import shutil
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serving.sessions.providers import usable_cores

TIMEOUT_S = 30
_barrier: Any = None  # of the processes that load


@dataclass(frozen=True)
class Post:
    """A request: `body` is a file."""

    url: str
    body: Path
    content_type: str = "image/jpeg"


def load(post: Post, clients: int, seconds: float) -> dict[str, float]:
    """Requests/s, errors, and latencies in ms, after a second that is not counted; each client has one connection."""
    send = _wrk if shutil.which("wrk") else _own
    send(post, clients, 1)
    said = send(post, clients, seconds)
    answered = said["requests"] - said["errors"]
    return {"requests_per_s": answered / said["seconds"]} | {k: said[k] for k in ("errors", "p50_ms", "p99_ms")}


def _wrk(post: Post, clients: int, seconds: float) -> dict[str, float]:
    threads = min(clients, usable_cores())
    command = ["wrk", f"-t{threads}", f"-c{clients}", f"-d{max(1, round(seconds))}s", f"--timeout={TIMEOUT_S}s"]
    script = [f"-s{Path(__file__).with_name('wrk.lua')}", post.url, "--", str(post.body), post.content_type]
    said = subprocess.run([*command, *script], check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(said.splitlines()[-1])
    return figures


def _own(post: Post, clients: int, seconds: float) -> dict[str, float]:
    """Threads in as many processes as there are cores, which begin together; what ends more than `seconds` later is not
    counted.
    """
    processes = min(clients, usable_cores())
    shares = [clients // processes + (i < clients % processes) for i in range(processes)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _meet_at, (context.Barrier(processes),)) as pool:
        said = pool.starmap(_process, [(post, share, seconds) for share in shares], chunksize=1)
    latencies = sorted(ms for ms_of_one, _ in said for ms in ms_of_one)
    errors = sum(failed for _, failed in said)
    cuts = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else [float("nan")] * 99
    figures = {"requests": len(latencies) + errors, "errors": errors, "p50_ms": cuts[49], "p99_ms": cuts[98]}
    return figures | {"seconds": seconds}


def _meet_at(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _process(post: Post, clients: int, seconds: float) -> tuple[list[float], int]:
    latencies: list[float] = []
    failures: list[object] = []
    url, body, headers = urlsplit(post.url), post.body.read_bytes(), {"Content-Type": post.content_type}
    _barrier.wait(TIMEOUT_S)
    ends = time.perf_counter() + seconds

    def client() -> None:
        connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=TIMEOUT_S)
        while (began := time.perf_counter()) < ends:
            try:
                connection.request("POST", url.path, body, headers)
                answer: Any = connection.getresponse()
                answer.read()
                failed = answer.status != 200
            except (OSError, http.client.HTTPException):
                connection.close()
                failed = True
            ended = time.perf_counter()
            if ended > ends:
                break
            if failed:
                failures.append(post.url)
            else:
                latencies.append(1e3 * (ended - began))
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, len(failures)
