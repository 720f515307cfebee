"""Clients that ask a service without pause and keep what became of each request."""

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from serving.client import Client

TIMEOUT_S = 60
Action = Literal["classify", "detect"]


@dataclass(frozen=True)
class Question:
    """A body for a model, and the answer to it: JSON, or the status of a refusal."""

    model: str
    action: Action
    body: bytes
    expected: Any


@dataclass(frozen=True)
class Outcome:
    """A request: when it began and ended, by `time.monotonic`, and "ok", "wrong", a status or an error's name."""

    began: float
    ended: float
    what: str


@dataclass
class Asking:
    """Outcomes, in the order of their ends."""

    outcomes: list[Outcome] = field(default_factory=list)

    def since(self, moment: float) -> list[Outcome]:
        """Those that ended after it."""
        return [outcome for outcome in list(self.outcomes) if outcome.ended > moment]

    def failures(self, moment: float = 0.0) -> Counter[str]:
        """What is not right, since a moment."""
        return Counter(outcome.what for outcome in self.since(moment) if outcome.what != "ok")

    def rate(self, begin: float, end: float) -> float:
        """Right answers a second."""
        return sum(o.what == "ok" and begin < o.ended <= end for o in list(self.outcomes)) / (end - begin)


@contextlib.contextmanager
def bare(url: str, questions: Sequence[Question], clients: int) -> Iterator[Asking]:
    """Clients without a second try, over connections that are kept."""

    def make() -> tuple[Callable[[Question], str], Callable[[], None]]:
        http = httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False)

        def ask(question: Question) -> str:
            try:
                answer = http.post(f"/v2/models/{question.model}/{question.action}", content=question.body)
            except httpx.HTTPError as error:
                return type(error).__name__
            return _judge(question, answer.status_code, answer.json() if answer.status_code == 200 else None)

        return ask, http.close

    with _asking(make, questions, clients) as asking:
        yield asking


@contextlib.contextmanager
def library(url: str, questions: Sequence[Question], clients: int) -> Iterator[Asking]:
    """`serving.client.Client`, with its retries."""

    def make() -> tuple[Callable[[Question], str], Callable[[], None]]:
        client = Client(url, timeout_s=TIMEOUT_S)

        def ask(question: Question) -> str:
            try:
                call: Any = client.classify if question.action == "classify" else client.detect
                return _judge(question, 200, call(question.model, question.body))
            except Exception as error:
                return _judge(question, getattr(error, "status", None) or repr(error), None)

        return ask, client.close

    with _asking(make, questions, clients) as asking:
        yield asking


def _judge(question: Question, status: object, answer: Any) -> str:
    if isinstance(question.expected, int):
        return "ok" if status == question.expected else f"{status}, not {question.expected}"
    return "wrong" if status == 200 and answer != question.expected else "ok" if status == 200 else str(status)


@contextlib.contextmanager
def _asking(
    make: Callable[[], tuple[Callable[[Question], str], Callable[[], None]]],
    questions: Sequence[Question],
    clients: int,
) -> Iterator[Asking]:
    asking, over = Asking(), threading.Event()

    def client(seed: int) -> None:
        choose = random.Random(seed)
        ask, close = make()
        while not over.is_set():
            question, began = choose.choice(questions), time.monotonic()
            what = ask(question)
            asking.outcomes.append(Outcome(began, time.monotonic(), what))
            if what != "ok":
                over.wait(0.01)  # a refusal comes at once: no storm of them
        close()

    threads = [threading.Thread(target=client, args=(seed,), daemon=True) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield asking
    finally:
        over.set()
        for thread in threads:
            thread.join()
