"""BatchQueue: what waits together runs together, nothing waits for company, and a failure stays in its batch; and what
a replica asks of it.
"""

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from serving import app
from serving.service.batching import BatchQueue


class Gate:
    """A model that keeps each batch until it is let through, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.let = threading.Semaphore(0)

    def run(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.entered.release()
        assert self.let.acquire(timeout=10)
        if -1 in items:
            raise ArithmeticError("no square of -1 here")
        return [item * item for item in items]

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, True, 10)

    def open(self, batches: int = 1) -> None:
        self.let.release(batches)


async def _submit(queue: BatchQueue[int, int], *items: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(queue.submit(item)) for item in items]
    await asyncio.sleep(0)  # let them put their items
    return tasks


def test_idle_runs_one_at_once_and_busy_fills_the_next_batch() -> None:
    async def scenario() -> None:
        gate = Gate()
        queue = BatchQueue(gate.run, max_batch_size=3)
        first = await _submit(queue, 1)
        await gate.wait_entered()
        rest = await _submit(queue, 2, 3, 4, 5)
        gate.open(3)
        assert await asyncio.gather(*first, *rest) == [1, 4, 9, 16, 25]
        assert gate.batches == [[1], [2, 3, 4], [5]]
        assert queue.batches == 3
        await queue.close()

    asyncio.run(scenario())


def test_each_batch_is_observed() -> None:
    async def scenario() -> None:
        seen: list[tuple[int, bool, bool, int]] = []
        gate = Gate()

        def observe(waited_s: Sequence[float], run_s: float, waiting: int) -> None:
            seen.append((len(waited_s), min(waited_s) >= 0, run_s > 0, waiting))

        batches = BatchQueue(gate.run, max_batch_size=2, observe=observe)
        first = await _submit(batches, 1)
        await gate.wait_entered()
        rest = await _submit(batches, 2, 3, 4)
        gate.open(3)
        await asyncio.gather(*first, *rest)
        await batches.close()
        assert seen == [(1, True, True, 3), (2, True, True, 1), (1, True, True, 0)]

    asyncio.run(scenario())


def test_an_exception_fails_its_own_item_only() -> None:
    async def scenario() -> None:
        gate = Gate()
        queue = BatchQueue(gate.run, max_batch_size=2)
        first = await _submit(queue, 1)
        await gate.wait_entered()
        rest = await _submit(queue, -1, 2, 3)
        gate.open(5)  # the batch of -1 and 2 again, one by one
        results = await asyncio.gather(*first, *rest, return_exceptions=True)
        assert isinstance(results.pop(1), ArithmeticError)
        assert results == [1, 4, 9]
        assert queue.batches == 3
        await queue.close()

    asyncio.run(scenario())


def test_wrong_number_of_results_is_an_error_for_all() -> None:
    async def scenario() -> None:
        queue: BatchQueue[int, int] = BatchQueue(lambda items: [], max_batch_size=2)
        with pytest.raises(AssertionError, match="0 results for 1 items"):
            await queue.submit(1)
        await queue.close()

    asyncio.run(scenario())


def test_cancelled_items_are_not_run() -> None:
    async def scenario() -> None:
        gate = Gate()
        queue = BatchQueue(gate.run, max_batch_size=2)
        first = await _submit(queue, 1)
        await gate.wait_entered()
        cancelled, *kept = await _submit(queue, 2, 3, 4)
        cancelled.cancel()
        await asyncio.sleep(0)
        gate.open(3)
        assert await asyncio.gather(*first, *kept) == [1, 9, 16]
        assert 2 not in sum(gate.batches, [])
        await queue.close()

    asyncio.run(scenario())


def test_cancelled_while_running_leaves_the_rest_of_its_batch_alone() -> None:
    async def scenario() -> None:
        gate = Gate()
        queue = BatchQueue(gate.run, max_batch_size=2)
        first = await _submit(queue, 1)
        await gate.wait_entered()
        pair = await _submit(queue, 2, 3)
        gate.open()
        await gate.wait_entered()
        pair[0].cancel()
        gate.open()
        assert await asyncio.gather(*first, pair[1]) == [1, 9]
        await queue.close()

    asyncio.run(scenario())


def test_close_finishes_what_waits_and_ends_the_thread() -> None:
    async def scenario() -> None:
        gate = Gate()
        before = threading.active_count()
        queue = BatchQueue(gate.run, max_batch_size=4)
        first = await _submit(queue, 1)
        await gate.wait_entered()
        rest = await _submit(queue, 2, 3)
        gate.open(2)
        closing = asyncio.create_task(queue.close())
        assert await asyncio.gather(*first, *rest) == [1, 4, 9]
        await closing
        assert not any(thread.name == "batches" for thread in threading.enumerate())
        assert threading.active_count() <= before + 2  # asyncio's own pool

    asyncio.run(scenario())


def test_workers_share_what_waits_and_the_longest_run_is_known() -> None:
    async def scenario() -> None:
        gate = Gate()
        queue = BatchQueue(gate.run, max_batch_size=1, workers=2)
        assert queue.longest_run_s() == 0
        items = await _submit(queue, 1, 2, 3)
        await gate.wait_entered()
        await gate.wait_entered()  # two at once, and the third waits
        assert sorted(gate.batches) == [[1], [2]]
        before = queue.longest_run_s()
        await asyncio.sleep(0.01)
        assert queue.longest_run_s() >= before + 0.01
        gate.open(3)
        assert await asyncio.gather(*items) == [1, 4, 9]
        assert queue.batches == 3 and queue.longest_run_s() == 0
        await queue.close()
        assert not any(thread.name == "batches" for thread in threading.enumerate())

    asyncio.run(scenario())


def test_a_batch_that_hangs_beside_others_fails_the_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica's, of nothing but its queue; item 0 takes until it is let."""

    async def scenario() -> None:
        entered, let = threading.Event(), threading.Event()

        def run(items: Sequence[int]) -> Sequence[int]:
            if 0 in items:
                entered.set()
                assert let.wait(30)
            return items

        replica: Any = object.__new__(app.ModelReplica)
        replica.batches, replica.probe, replica.batches_seen = BatchQueue(run, 1, workers=2), 1, 0
        await replica.check_health()
        assert replica.batches_seen == 1  # the probe's
        hanging = asyncio.create_task(replica.batches.submit(0))
        assert await asyncio.to_thread(entered.wait, 10)
        assert await replica.batches.submit(2) == 2
        await replica.check_health()  # for not long yet
        assert replica.batches_seen == 2  # no probe
        while replica.batches.longest_run_s() <= 0.01:
            await asyncio.sleep(0.01)
        with monkeypatch.context() as patch:
            patch.setattr(app, "PROBE_TIMEOUT_S", 0.01)
            assert await replica.batches.submit(3) == 3  # what the other thread answers says nothing of this one
            with pytest.raises(TimeoutError, match=r"a batch has been running for more than 0\.01 s"):
                await replica.check_health()
        let.set()
        assert await hanging == 0
        await replica.check_health()
        await replica.batches.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("took_s", "long"), [((0.006,) * 3, True), ((0.006, 0.006, 0.004), False), ((0.004,), False)])
def test_an_image_takes_long_if_each_run_does(
    monkeypatch: pytest.MonkeyPatch, took_s: Sequence[float], long: bool
) -> None:
    clock = iter([moment for seconds in took_s for moment in (0.0, seconds)])
    monkeypatch.setattr(app, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(app, "create_predictor", lambda model: SimpleNamespace(predict=lambda images: images))
    model: Any = None
    assert app._takes_long(model, "probe") == long
    assert not list(clock)
