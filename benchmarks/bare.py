"""Loops of decoding and onnxruntime in one process, without HTTP: what a server is held against."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

from serving.predictor import create_predictor
from serving.runtime import OnnxModel, Provider, usable_cores

BATCH = 8
Loop = Callable[[float], float]  # seconds to images/s


def loops(artifact: Path, picture: bytes, provider: Provider = "cpu") -> dict[str, Loop]:
    """By name; the best of them is the bar."""
    cores = usable_cores()
    wide = cast(Any, create_predictor(OnnxModel(artifact, provider, cores)))
    narrow = cast(Any, create_predictor(OnnxModel(artifact, provider, 1)))

    def serial(seconds: float) -> float:
        return _rate(lambda: len(wide.predict([wide.prepare(picture)])), seconds)

    def overlapped(seconds: float) -> float:
        """Threads decode ahead while a batch runs on all cores."""
        with ThreadPoolExecutor(cores) as pool:
            ahead = deque[Future[Any]](pool.submit(wide.prepare, picture) for _ in range(2 * BATCH))

            def batch() -> int:
                prepared = [ahead.popleft().result() for _ in range(BATCH)]
                ahead.extend(pool.submit(wide.prepare, picture) for _ in prepared)
                return len(wide.predict(prepared))

            return _rate(batch, seconds)

    def side_by_side(seconds: float) -> float:
        """A thread a core does all of a picture, in a session of one thread."""
        with ThreadPoolExecutor(cores) as pool:
            work = partial(_rate, lambda: len(narrow.predict([narrow.prepare(picture)])))
            return sum(pool.map(work, [seconds] * cores))

    return {"serial": serial, "overlapped": overlapped, "side by side": side_by_side}


def latency_ms(artifact: Path, picture: bytes, seconds: float, provider: Provider = "cpu") -> float:
    """The median of one picture after the other, on all cores."""
    predictor = cast(Any, create_predictor(OnnxModel(artifact, provider)))
    taken: list[float] = []

    def one() -> int:
        began = time.perf_counter()
        predictor.predict([predictor.prepare(picture)])
        taken.append(time.perf_counter() - began)
        return 1

    _rate(one, seconds)
    return 1e3 * statistics.median(taken[len(taken) // 10 :])


def _rate(work: Callable[[], int], seconds: float) -> float:
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        done += work()
    return done / passed
