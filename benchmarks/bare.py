"""Loops of decoding and onnxruntime in one process, without HTTP or Ray: what a server or a job is held against."""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

from serving.predictor import create_predictor
from serving.runtime import OnnxModel, Provider, usable_cores

BATCH = 8
Loop = Callable[[float], float]  # seconds to images/s


def loops(artifact: Path, pictures: Sequence[bytes | Path], provider: Provider = "cpu") -> dict[str, Loop]:
    """By name; the best of them is the bar. Each takes the pictures in turn, in sessions as those of the service and of
    the job, and is warm before its time begins.
    """
    cores = usable_cores()
    wide = cast(Any, create_predictor(OnnxModel(artifact, provider, cores)))
    narrow = cast(Any, create_predictor(OnnxModel(artifact, provider, 1)))
    following = itertools.cycle(pictures).__next__

    def serial(seconds: float) -> float:
        return _rate(lambda: len(wide.predict([wide.prepare(following())])), seconds)

    def overlapped(size: int, seconds: float) -> float:
        """Threads decode ahead while a batch runs on all cores."""
        with ThreadPoolExecutor(cores) as pool:
            ahead = deque[Future[Any]](pool.submit(wide.prepare, following()) for _ in range(2 * BATCH))

            def batch() -> int:
                prepared = [ahead.popleft().result() for _ in range(size)]
                ahead.extend(pool.submit(wide.prepare, following()) for _ in prepared)
                return len(wide.predict(prepared))

            return _rate(batch, seconds)

    def side_by_side(seconds: float) -> float:
        """A thread a core does all of a picture, in a session of one thread."""
        with ThreadPoolExecutor(cores) as pool:
            work = partial(_rate, lambda: len(narrow.predict([narrow.prepare(following())])))
            return sum(pool.map(work, [seconds] * cores))

    ahead = {f"decoding ahead, batch {size}": partial(overlapped, size) for size in (1, BATCH)}
    return {"serial": serial, **ahead, "side by side": side_by_side}


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
    work()
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        done += work()
    return done / passed
