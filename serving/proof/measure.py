"""A place's answers to a data set, and what giving them took; no torch here, so that it is in no artefact's memory."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from serving.evaluate import Source, run_eval
from serving.jobs.results import Row, to_row, to_table
from serving.proof.memory import PeakMemory, own_peak
from serving.runtime import OnnxModel
from serving.sessions.providers import NAMES, ON_GPU, Provider

Result = TypeVar("Result")


@dataclass(frozen=True)
class Measured:
    """A place's answers to a data set.

    Attributes:
        metric: top-1 or AP50, in [0, 1].
        seconds: from the first image to the last answer; reading and decoding are in it, and a batch job's start.
        peak_bytes: resident, of its largest process; None where the system does not tell.
    """

    metric: float
    rows: list[Row]
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Scoring:
    """A data set and its metric."""

    config: str
    overrides: tuple[str, ...]
    metric: str

    def measure(self, source: Source) -> Measured:
        """Score a source and keep its answers."""
        recorded = Recorded(source)
        result = run_eval(self.config, self.overrides, recorded)[0]
        return Measured(float(result[self.metric]), recorded.kept, recorded.seconds)


class Recorded:
    """A source whose answers, and the seconds that they took, are kept."""

    def __init__(self, source: Source):
        self.name, self.metadata, self._source = source.name, source.metadata, source
        self.kept: list[Row] = []
        self.seconds = 0.0

    def rows(self, paths: Sequence[Path]) -> Iterator[Row]:
        began = time.perf_counter()
        for row in self._source.rows(paths):
            self.kept.append(row)
            self.seconds = time.perf_counter() - began
            yield row


def alone(work: Callable[[], Result]) -> Result:
    """What `work` gives, or raises, in a process of its own, whose memory nothing else takes; pickled on its way."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work).result()


def resolved(artifact: Path, wanted: Provider) -> Provider:
    """What `auto` is here; any other is opened, so that one that cannot be had is known before the long work.

    Raises:
        InputError: one that cannot be had.
    """
    given = OnnxModel(artifact, wanted).provider
    return next((provider for provider in ON_GPU if NAMES[provider] == given), "cpu" if wanted == "auto" else wanted)


def measure_alone(scoring: Scoring, source: Callable[[], Source]) -> Measured:
    """A source in a process of its own, with the memory that this takes; raises what opening or scoring it raises."""
    return alone(partial(_measure_here, scoring, source))


def _measure_here(scoring: Scoring, source: Callable[[], Source]) -> Measured:
    opened = source()
    measured = scoring.measure(opened)
    rows = [to_row(record) for record in to_table(measured.rows, opened.metadata).to_pylist()]  # lighter to carry
    return replace(measured, rows=rows, peak_bytes=own_peak())


def measure_with_children(scoring: Scoring, source: Source) -> Measured:
    """Measured here, where the work is that of Ray's processes."""
    with PeakMemory() as peak:
        measured = scoring.measure(source)
    return replace(measured, peak_bytes=peak.bytes)
