"""A service that is loaded, overloaded, killed piecewise and stopped; exits with 1 if it breaks what is promised.

    python -m benchmarks.stress [--parts soak kills overload hostile stop] [--minutes 10] [--json FILE]

soak: 64 clients, both models, good and bad input: every answer right, or 503; memory flat after the first minute.
kills: SIGKILL of a replica, of HAProxy and of Ray's proxy actor under load: the client library sees no failure, a bare
client only what was in flight, and the service has four fifths of its speed again within 15 s.
overload: ten times the clients that a slow model's queue takes: what is accepted is answered in bounded time, the rest
gets 503 at once.
hostile: pictures cut at many lengths, 2 000 other bodies and misbehaving senders, memory before and after.
stop: SIGTERM under load: what was accepted is answered, the process ends within 10 s, and nothing is left.

The models are a classifier and a detector with random weights; answers are compared with the predictor's here.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from backbones.cli import at_least
from backbones.errors import exit_on_input_error
from backbones.files import versions, write_json
from benchmarks import clients, hostile
from benchmarks.clients import Question
from benchmarks.contest import table
from benchmarks.processes import memory_mb, tree
from benchmarks.serving import DETECTOR, NOTHING, artifact, jpeg
from serving.api.schemas import classify_answer, detect_answer
from serving.predictor import create_predictor
from serving.runtime import OnnxModel
from serving.service.environment import free_port

PARTS = ("soak", "kills", "overload", "hostile", "stop")
SOAKING, KILLING = 64, 16  # clients
SAMPLE_S = 10  # between two looks at the memory
RECOVERY_S, RECOVERED, STOP_S, GROWTH = 15, 0.8, 10, 0.05
VICTIMS = {"replica": "^ray::ServeReplica:classifier", "HAProxy": "haproxy -db", "proxy actor": "^ray::HAProxyManager"}
Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=at_least(1), default=10, help="of the soak")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    settings = vars(args) | {"json": None}
    result: Figures = {"settings": settings, "versions": versions("ray", "onnxruntime-gpu"), "parts": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = questions(folder)
        for part in args.parts:
            with running(folder, slow=part == "overload") as (process, url):
                took = {
                    "soak": lambda: soak(process.pid, url, asked, 60 * args.minutes),
                    "kills": lambda: kills(process.pid, url, asked),
                    "overload": lambda: overload(url, asked),
                    "hostile": lambda: attack(process.pid, url, asked),
                    "stop": lambda: stop(process, url, asked),
                }[part]()
            result["parts"][part] = took
            print(json.dumps({part: took}, indent=1), flush=True)
    print(markdown(result))
    if args.json:
        write_json(args.json, result)
    broken = [f"{part}: {promise}" for part, took in result["parts"].items() for promise in took["broken"]]
    print("\n".join(broken) or "every promise is kept")
    sys.exit(1 if broken else 0)


def questions(folder: Path) -> list[Question]:
    """Pictures of several sizes with the answers that the predictors give here, and broken ones."""
    asked = []
    for name, answer in (("classifier", classify_answer), ("detector", detect_answer)):
        model = OnnxModel(artifact(NOTHING if name == "classifier" else DETECTOR, folder), "cpu")
        predictor = cast(Any, create_predictor(model))
        action: clients.Action = "classify" if name == "classifier" else "detect"
        for i in range(6):
            body = jpeg(folder / "a.jpg", 200 + 40 * i, 180 + 10 * i).read_bytes()
            (found,) = predictor.predict([predictor.prepare(body)])
            expected = json.loads(json.dumps(cast(Any, answer)(model.metadata, found)))
            asked.append(Question(name, action, body, expected))
        asked.append(Question(name, action, body[:100], 422))
        asked.append(Question(name, action, b"", 400))
    return asked


@contextlib.contextmanager
def running(folder: Path, slow: bool) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m serving run` with two replicas of the classifier, and its URL."""
    port = free_port()
    detector: Figures = {"name": "detector", "artifact": str(artifact(DETECTOR, folder))}
    detector |= {"max_ongoing_requests": 8, "max_queued_requests": 8} if slow else {"max_queued_requests": 1024}
    classifier = {"name": "classifier", "artifact": str(artifact(NOTHING, folder)), "replicas": 2, "threads": 1}
    config = folder / "serving.yaml"
    config.write_text(yaml.safe_dump({"port": port, "models": [classifier, detector]}))
    command = [sys.executable, "-m", "serving", "run", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    try:
        assert any(line.startswith("try: ") for line in process.stdout), "the service does not start"
        yield process, f"http://127.0.0.1:{port}"
    finally:
        left = tree(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2 * STOP_S)
        for each in left:
            if each.alive():
                os.kill(each.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def soak(pid: int, url: str, asked: list[Question], seconds: float) -> Figures:
    samples = []
    began = time.monotonic()
    with clients.bare(url, asked, SOAKING) as asking:
        while time.monotonic() < began + seconds:
            time.sleep(SAMPLE_S)
            samples.append((time.monotonic() - began, memory_mb(pid)))
    first = [mb for at, mb in samples if at <= 60][-1]
    last = statistics.median([mb for _, mb in samples][-3:])
    failures = asking.failures()
    return {
        "answers": len(asking.outcomes), "failures": failures, "memory_mb": samples, "growth": last / first - 1,
        "broken": _broken({
            f"{sum(failures.values())} answers were not right": not set(failures) - {"503"},
            f"memory grew by {last / first - 1:.1%}": last <= (1 + GROWTH) * first,
        }),
    }  # fmt: skip


def kills(pid: int, url: str, asked: list[Question]) -> Figures:
    result: Figures = {"broken": []}
    half = KILLING // 2
    for name, pattern in VICTIMS.items():
        with clients.bare(url, asked, half) as bare, clients.library(url, asked, half) as library:
            time.sleep(5)
            victim = [process for process in tree(pid) if re.search(pattern, process.command())][-1]
            moment = time.monotonic()
            before = bare.rate(moment - 3, moment)
            os.kill(victim.pid, signal.SIGKILL)
            recovered = None
            while recovered is None and time.monotonic() < moment + 4 * RECOVERY_S:
                time.sleep(0.5)
                now = time.monotonic()
                successors = [p for p in tree(pid) if re.search(pattern, p.command()) and p.begin > victim.begin]
                if successors and now > moment + 2 and bare.rate(now - 2, now) > RECOVERED * before:
                    recovered = now - moment
        lost = [outcome for outcome in bare.since(moment) if outcome.what != "ok"]
        late = [outcome for outcome in lost if outcome.began > moment + 0.5]
        result[name] = {
            "requests_per_s_before": before, "recovered_s": recovered, "lost": Counter(o.what for o in lost),
            "library": library.failures(), "longest_s": max(o.ended - o.began for o in bare.since(moment)),
        }  # fmt: skip
        result["broken"] += _broken({
            f"{name}: the client library saw {library.failures()}": not library.failures(),
            f"{name}: bare clients lost {len(lost)} requests, {len(late)} begun later": len(lost) <= half and not late,
            f"{name}: fast again after {recovered} s": recovered is not None and recovered <= RECOVERY_S,
        })  # fmt: skip
    return result


def overload(url: str, asked: list[Question]) -> Figures:
    """The detector takes 8 at once and queues 8: it is asked by 160."""
    good = [question for question in asked if question.model == "detector" and not isinstance(question.expected, int)]
    with clients.bare(url, good, 8) as calm:
        time.sleep(10)
    with clients.bare(url, good, 160) as stormy:
        time.sleep(20)
    usual, accepted, refused = (
        np.array([o.ended - o.began for o in outcomes])
        for outcomes in (
            calm.outcomes,
            [o for o in stormy.outcomes if o.what == "ok"],
            [o for o in stormy.outcomes if o.what == "503"],
        )
    )
    others = set(stormy.failures()) - {"503"}
    p99, refused_p99 = (float(np.quantile(times, 0.99)) if len(times) else 0.0 for times in (accepted, refused))
    return {
        "usual_p50_s": float(np.median(usual)), "accepted_p50_s": float(np.median(accepted)), "accepted_p99_s": p99,
        "accepted": len(accepted), "refused": len(refused), "refused_p99_s": refused_p99, "others": stormy.failures(),
        "broken": _broken({
            f"other answers than 200 and 503: {others}": not others,
            "nobody was refused": len(refused) > 0,
            f"an accepted request took {p99:.1f} s": p99 < 10 * float(np.median(usual)) + 1,
            f"a refusal took {refused_p99:.2f} s": refused_p99 < 1,
        }),
    }  # fmt: skip


def attack(pid: int, url: str, asked: list[Question]) -> Figures:
    before = memory_mb(pid)
    verdicts = hostile.send_all(url, hostile.requests("classifier", "detector", 2000))
    verdicts += hostile.misbehave(url, "classifier", asked[0].body)
    after = memory_mb(pid)
    with clients.bare(url, asked, 8) as asking:
        time.sleep(2)
    wrong = [f"{verdict.kind}: {verdict.wrong}" for verdict in verdicts if verdict.wrong]
    return {
        "answers": Counter(f"{verdict.kind}: {verdict.status}" for verdict in verdicts),
        "memory_mb": [before, after],
        "broken": [
            *wrong,
            *_broken({
                f"memory went from {before:.0f} to {after:.0f} MB": after < 1.2 * before + 100,
                f"afterwards {asking.failures()}": not asking.failures(),
            }),
        ],
    }  # fmt: skip


def stop(process: subprocess.Popen[str], url: str, asked: list[Question]) -> Figures:
    below = tree(process.pid)
    with clients.bare(url, asked, KILLING) as asking:
        time.sleep(5)
        moment = time.monotonic()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        took = time.monotonic() - moment
        time.sleep(1)
        left = [each.command() for each in below if each.alive()]
    # A later connection is refused, or reset where it waits, which tests/test_serving_resilience.py tells from others.
    lost = Counter(o.what for o in asking.since(moment) if o.what not in ("ok", "ConnectError", "ReadError"))
    return {
        "took_s": took, "answers": Counter(o.what for o in asking.since(moment)), "left": left,
        "broken": _broken({
            f"accepted requests were lost: {lost}": not lost,
            f"the end took {took:.1f} s": took <= STOP_S,
            f"left behind: {left}": not left,
        }),
    }  # fmt: skip


def markdown(result: Figures) -> str:
    """A row a part: what was seen, and which promises were not kept."""
    parts, seen = result["parts"], {}
    if soaked := parts.get("soak"):
        seen["soak"] = f"{soaked['answers']} answers, refused or failed {_counts(soaked['failures'])}; memory " + (
            f"{soaked['memory_mb'][-1][1]:.0f} MB at the end, {soaked['growth']:+.1%} after the first minute"
        )
    if killed := parts.get("kills"):
        seen["kills"] = "; ".join(
            f"{name}: fast again after {_seconds(killed[name]['recovered_s'])}, bare clients lost "
            f"{_counts(killed[name]['lost'])}, the library's {_counts(killed[name]['library'])}"
            for name in VICTIMS
        )
    if stormed := parts.get("overload"):
        seen["overload"] = (
            f"{stormed['accepted']} accepted, p99 {_seconds(stormed['accepted_p99_s'])} (p50 without the storm "
            f"{_seconds(stormed['usual_p50_s'])}); {stormed['refused']} refused, p99 "
            f"{_seconds(stormed['refused_p99_s'])}"
        )
    if attacked := parts.get("hostile"):
        before, after = attacked["memory_mb"]
        seen["hostile"] = f"{sum(attacked['answers'].values())} requests; memory {before:.0f} to {after:.0f} MB"
    if stopped := parts.get("stop"):
        seen["stop"] = f"ended after {_seconds(stopped['took_s'])}, {len(stopped['left'])} processes left"
    rows = [[part, said, "; ".join(parts[part]["broken"]) or "kept"] for part, said in seen.items()]
    return "\n".join(table(["part", "seen", "promises"], rows))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in counts.items()) or "none"


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.2g} s"


def _broken(promises: dict[str, bool]) -> list[str]:
    """What is said of those that were not kept."""
    return [said for said, kept in promises.items() if not kept]


if __name__ == "__main__":
    with exit_on_input_error():
        main()
