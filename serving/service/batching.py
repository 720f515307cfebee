"""Batches as they come: futures in front of worker threads; no Ray, no torch here."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from serving.service import traces

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Entry(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Result]
    since: float  # seconds of `time.perf_counter`, as the next two, of its batch
    began: float = 0.0
    ended: float = 0.0


class BatchQueue(Generic[Item, Result]):
    """Runs what waits, up to `max_batch_size` items at a time, in threads of its own.

    A thread takes its next batch itself, so that it never waits for the event loop, and it never waits
    for a batch to fill: an idle model runs a lone item at once, a busy one finds a batch when it is done.
    Several threads share what waits. Made and used on one event loop. It has no bound: whoever submits has one.

    Args:
        run: items to their results, in order; by as many threads at once as there are `workers`.
        observe: takes what became of a batch, in the thread: seconds that each item waited, seconds that it ran, and
            how many items wait still.

    Attributes:
        batches: how many have been run without an exception.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        max_batch_size: int,
        observe: Callable[[Sequence[float], float, int], None] | None = None,
        workers: int = 1,
    ):
        self.batches = 0
        self._under_way: dict[int, float] = {}  # of a thread, when its batch began
        self._run = run
        self._observe = observe
        self._max_batch_size = max_batch_size
        self._loop = asyncio.get_running_loop()
        self._waiting: queue.SimpleQueue[_Entry[Item, Result] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="batches", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    async def submit(self, item: Item) -> Result:
        """The result of `item`, or the exception that it alone raises: the items of a batch that fails are run one by
        one. A cancelled caller's item is dropped if it has not been taken yet.
        """
        entry: _Entry[Item, Result] = _Entry(item, self._loop.create_future(), time.perf_counter())
        self._waiting.put(entry)
        result = await entry.future
        traces.stage("queue", entry.since, entry.began)
        traces.stage("run", entry.began, entry.ended)
        return result

    def longest_run_s(self) -> float:
        """Seconds of the batch that has been running for longest; 0 if none is."""
        return max((time.perf_counter() - began for began in [*self._under_way.values()]), default=0)

    async def close(self) -> None:
        """Run what was submitted before, then end the threads."""
        self._waiting.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _work(self) -> None:
        while batch := self._take():
            entries = [entry for entry in batch if not entry.future.cancelled()]
            try:
                if entries:
                    self._answer(entries)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _answer(self, entries: list[_Entry[Item, Result]]) -> None:
        error: BaseException | None = None
        results: Sequence[Result] = ()
        began = self._under_way[threading.get_ident()] = time.perf_counter()
        try:
            results = self._run([entry.item for entry in entries])
            assert len(results) == len(entries), f"{len(results)} results for {len(entries)} items"
            ended = time.perf_counter()
            for entry in entries:
                entry.began, entry.ended = began, ended
            if self._observe is not None:
                waited = [began - entry.since for entry in entries]
                self._observe(waited, ended - began, self._waiting.qsize())
        except BaseException as raised:  # the batch's own; the next one starts afresh
            error = raised
        del self._under_way[threading.get_ident()]
        if error is not None and len(entries) > 1:
            for entry in entries:  # one of them is at fault, or they are too many at once
                self._answer([entry])
        else:
            self._loop.call_soon_threadsafe(self._deliver, entries, results, error)

    def _take(self) -> list[_Entry[Item, Result]]:
        """At least one entry, waiting for it; none once closed."""
        first = self._waiting.get()
        if first is None:
            self._waiting.put(None)  # for the other threads
            return []
        batch = [first]
        while len(batch) < self._max_batch_size:
            try:
                entry = self._waiting.get_nowait()
            except queue.Empty:
                break
            if entry is None:
                self._waiting.put(None)  # for the next call, after this batch
                break
            batch.append(entry)
        return batch

    def _deliver(
        self, entries: list[_Entry[Item, Result]], results: Sequence[Result], error: BaseException | None
    ) -> None:
        self.batches += error is None
        for i, entry in enumerate(entries):
            if entry.future.done():  # cancelled meanwhile
                continue
            if error is None:
                entry.future.set_result(results[i])
            else:
                entry.future.set_exception(error)
