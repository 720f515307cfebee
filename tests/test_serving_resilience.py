"""A service that is killed piecewise, stopped under load and sent what no honest client sends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from artifacts import COLOURS, picture, write_classifier, write_detector
from services import within

from benchmarks import clients, hostile
from benchmarks.clients import Question
from benchmarks.processes import Process, memory_mb, tree
from benchmarks.stress import VICTIMS
from serving.api.schemas import classify_answer, detect_answer
from serving.client import Client
from serving.config import ServedModel, ServingConfig
from serving.predictor import create_predictor
from serving.runtime import OnnxModel
from serving.service.environment import find_haproxy, free_port

BARE, WITH_RETRIES = 6, 3  # clients
RECOVERED_S = 60  # on a machine that does much else; benchmarks/stress.py asks for 15
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_haproxy() is None, reason="no HAProxy")]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artefacts")
    return {
        "classifier": write_classifier(folder / "classifier.onnx"),
        "detector": write_detector(folder / "detector.onnx"),
    }


@pytest.fixture(scope="module")
def questions(artefacts: dict[str, Path]) -> list[Question]:
    """With the answers that the predictors give here."""
    asked = []
    for name, answer in (("classifier", classify_answer), ("detector", detect_answer)):
        model = OnnxModel(artefacts[name], "cpu")
        predictor = create_predictor(model)
        action = "classify" if name == "classifier" else "detect"
        for i, colour in enumerate(COLOURS):
            body = picture(colour, (60 + 7 * i, 40))
            (found,) = predictor.predict([predictor.prepare(body)])  # type: ignore[list-item]
            expected = json.loads(json.dumps(answer(model.metadata, found)))  # type: ignore[operator]
            asked.append(Question(name, action, body, expected))  # type: ignore[arg-type]
        asked.append(Question(name, action, picture("red")[:50], 422))  # type: ignore[arg-type]
    return asked


def _models(artefacts: dict[str, Path]) -> tuple[ServedModel, ...]:
    return tuple(
        ServedModel(name=name, artifact=str(path), replicas=2, num_cpus=0.1, threads=1)
        for name, path in artefacts.items()
    )


@dataclass
class Command:
    """`python -m serving run`, which is ready."""

    process: "subprocess.Popen[str]"
    config: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def says(self, words: str) -> None:
        assert self.process.stdout is not None
        assert any(words in line for line in self.process.stdout), f"it ended without {words!r}"


def _configure(path: Path, port: int, models: Sequence[ServedModel]) -> None:
    config = ServingConfig(port=port, models=tuple(models))
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_defaults=True)))  # JSON is YAML


@contextmanager
def _running(folder: Path, models: Sequence[ServedModel], **environment: str) -> Iterator[Command]:
    """Whatever is left of it at the end is killed."""
    config, port = folder / "serving.yaml", free_port()
    _configure(config, port, models)
    started = [sys.executable, "-m", "serving", "run", str(config)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}  # of other tests
    env |= environment
    running = subprocess.Popen(started, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=env)
    command = Command(running, config, port)
    try:
        command.says("try: ")
        yield command
    finally:
        left = tree(running.pid)
        running.kill()
        running.communicate()
        for each in left:
            if each.alive():
                os.kill(each.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def service(artefacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """That the tests of this file share, until one of them stops it."""
    with _running(tmp_path_factory.mktemp("service"), _models(artefacts)) as command:
        yield command


def _one(pattern: str, root: int) -> Process:
    found = [process for process in tree(root) if re.search(pattern, process.command())]
    assert found, [process.command() for process in tree(root)]
    return found[-1]


@pytest.mark.parametrize("name", VICTIMS)
def test_killed_under_load(service: Command, questions: list[Question], name: str) -> None:
    with (
        clients.bare(service.url, questions, BARE) as bare,
        clients.library(service.url, questions, WITH_RETRIES) as library,
    ):
        time.sleep(1)
        killed = _one(VICTIMS[name], service.process.pid)
        assert not bare.failures() and bare.outcomes
        moment = time.monotonic()
        os.kill(killed.pid, signal.SIGKILL)
        deadline = moment + RECOVERED_S
        successor = False
        while not (successor and bare.rate(time.monotonic() - 1, time.monotonic()) > 0):
            assert time.monotonic() < deadline
            time.sleep(0.2)
            running = [p for p in tree(service.process.pid) if re.search(VICTIMS[name], p.command())]
            successor = any(process.begin > killed.begin for process in running)
    assert not library.failures()
    lost = [outcome for outcome in bare.since(moment) if outcome.what != "ok"]
    assert len(lost) <= BARE and all(outcome.began < moment + 0.5 for outcome in lost), bare.failures(moment)


def test_2000_hostile_bodies(service: Command, questions: list[Question]) -> None:
    before = memory_mb(service.process.pid)
    verdicts = hostile.send_all(service.url, hostile.requests("classifier", "detector", 2000))
    assert len(verdicts) > 3000  # a thousand and more truncations, and the 2000
    verdicts += hostile.misbehave(service.url, "classifier", picture("red"))
    wrong = [f"{verdict.kind}: {verdict.wrong}" for verdict in verdicts if verdict.wrong]
    assert not wrong, "\n".join(wrong)
    assert {verdict.status for verdict in verdicts if verdict.kind == "bomb"} == {422}
    assert {verdict.status for verdict in verdicts if verdict.kind.startswith("100 MB")} <= {413, None}
    assert memory_mb(service.process.pid) < 1.2 * before + 100
    with clients.bare(service.url, questions, BARE) as bare:
        time.sleep(1)
    assert bare.outcomes and not bare.failures()


def test_only_the_port_that_was_asked_for_is_open_to_others(service: Command) -> None:
    """HAProxy's own pages are on the loopback address."""
    haproxy = _one("haproxy -db", service.process.pid)
    inodes = {os.readlink(path) for path in Path(f"/proc/{haproxy.pid}/fd").iterdir() if path.is_symlink()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}
    assert listening == {"0100007F"}


def test_answers_are_equal_to_the_bit_at_any_concurrency(service: Command, questions: list[Question]) -> None:
    for concurrency in (1, 3, 16):
        with clients.bare(service.url, questions, concurrency) as bare:
            time.sleep(1)
        assert len(bare.outcomes) > concurrency and not bare.failures()


def _gone(processes: list[Process], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while left := [process.command() for process in processes if process.alive()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_sighup_rolls_out_and_sigterm_under_load_ends(
    service: Command, artefacts: dict[str, Path], questions: list[Question], tmp_path: Path
) -> None:
    """A config that cannot be served changes nothing. What was accepted is answered, and nothing is left."""
    running, url = service.process, service.url
    before, detector = _models(artefacts)
    with Client(url) as client:
        for artefact, answer, serves in (
            (tmp_path / "none.onnx", "not rolled out, what ran before goes on: model 'classifier': no art", "colours"),
            (write_classifier(tmp_path / "new.onnx", name="new"), "rolled out after", "new"),
        ):
            changed = before.model_copy(update={"artifact": str(artefact)})
            _configure(service.config, service.port, [changed, detector])
            running.send_signal(signal.SIGHUP)
            service.says("loading the config again")
            service.says(answer)
            within(30, lambda serves=serves: client.artifact("classifier").model == serves)  # type: ignore[misc]
    below, statuses = tree(running.pid), list[str]()
    lock = threading.Barrier(BARE + 1)

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            http.get("/v2")
            lock.wait()
            while True:
                try:
                    answer = http.post("/v2/models/classifier/classify", content=questions[0].body)
                except httpx.TransportError as error:
                    statuses.append(type(error).__name__)
                    return
                statuses.append(str(answer.status_code))
                if answer.headers.get("connection") == "close":
                    return

    with ThreadPoolExecutor(BARE) as pool:
        asked = [pool.submit(ask) for _ in range(BARE)]
        lock.wait()
        within(30, lambda: len(statuses) >= BARE)
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
        took = time.monotonic() - began
        for future in asked:
            future.result()
    assert statuses.count("200") > BARE and set(statuses) == {"200"}
    assert took < 30  # benchmarks/stress.py asks for 10
    _gone(below, within_s=5)


def test_ray_alone_serves_without_haproxy(
    artefacts: dict[str, Path], questions: list[Question], tmp_path: Path
) -> None:
    with _running(tmp_path, _models(artefacts)[:1], RAY_SERVE_ENABLE_HA_PROXY="0") as command:
        running, url = command.process, command.url
        below = tree(running.pid)
        assert not any("haproxy" in each.command().lower() for each in below)
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            assert http.get("/v2/health/ready").status_code == 200
            assert http.post("/v2/models/classifier/classify", content=questions[0].body).status_code == 200
            refused = http.post("/v2/models/classifier/classify", content=b"no picture")
            assert refused.status_code == 422 and list(refused.json()) == ["error"]
            assert (
                http.post("/v2/models/nothing/classify", content=b"x").json()["error"].startswith("no model 'nothing'")
            )
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
        _gone(below, within_s=10)


def test_sigkill_leaves_nothing_behind(artefacts: dict[str, Path], tmp_path: Path) -> None:
    """But Ray's two agents, which look for the head of their cluster for a minute more."""
    with _running(tmp_path, _models(artefacts)[:1]) as command:
        below = [each for each in tree(command.process.pid) if not each.command().endswith("Agent")]
        assert any("haproxy -db" in each.command() for each in below)
        command.process.kill()
        command.process.wait()
        _gone(below, within_s=40)
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", command.port))
