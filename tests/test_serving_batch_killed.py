"""A batch job whose parts are killed, each in the middle: what comes out equals what comes out undisturbed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import picture, write_classifier
from PIL import Image

from benchmarks.processes import tree
from serving.jobs.results import read_results
from serving.predictor import create_predictor
from serving.runtime import OnnxModel

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")
IMAGES = 400
PART = 16
WAIT_S = 120  # for what takes seconds on a machine with nothing else to do


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slow model, and images of it: all different, one in a hundred broken."""
    root = tmp_path_factory.mktemp("killed")
    write_classifier(root / "m.onnx", work=3)
    (root / "in").mkdir()
    for i in range(IMAGES):
        pixels = np.full((40, 40, 3), (i % 256, i // 256, 7 * i % 256), np.uint8)
        Image.fromarray(pixels).save(root / "in" / f"{i:03}.png")
    for i in range(0, IMAGES, 100):
        (root / "in" / f"{i:03}.png").write_bytes(picture("red")[:50])
    return root


def start(work: Path, name: str, *overrides: str, address: str = "") -> "subprocess.Popen[str]":
    (work / f"{name}.yaml").write_text(
        f"input: {work / 'in'}\noutput: {work / name}\npart_rows: {PART}\nbatch_size: 2\n"
        f"models: [{{name: m, artifact: {work / 'm.onnx'}}}]\n"
    )
    command = [sys.executable, "-m", "serving", "batch", str(work / f"{name}.yaml"), *overrides]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"} | ({"RAY_ADDRESS": address} if address else {})
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def parts(work: Path, name: str) -> int:
    return len(list((work / name / "m").glob("part-*.parquet")))


def wait_for(what: Callable[[], Any], job: "subprocess.Popen[str] | None" = None) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing came of it"
        assert job is None or job.poll() is None, job.communicate()
        time.sleep(0.02)
    return found


def check(work: Path, name: str) -> None:
    """The rows are those of the predictor itself, each image once, and errors in their places."""
    predictor: Any = create_predictor(OnnxModel(work / "m.onnx", "cpu"))
    _, rows = read_results(work / name / "m")
    assert [row.path for row in rows] == [f"{i:03}.png" for i in range(IMAGES)]
    assert [row.path for row in rows if row.error] == [f"{i:03}.png" for i in range(0, IMAGES, 100)]
    for row in rows:
        if row.result is not None:
            (expected,) = predictor.predict([predictor.prepare(work / "in" / row.path)])
            assert row.result.probabilities.tobytes() == expected.probabilities.tobytes()
    assert not [path for path in (work / name).rglob(".*") if path.name != ".lock"]


def finish(job: "subprocess.Popen[str]") -> str:
    out, err = job.communicate(timeout=WAIT_S)
    assert job.returncode == 0, err
    return out


def test_the_driver(work: Path) -> None:
    """With SIGKILL; the second start does what is missing and no more."""
    job = start(work, "driver")
    wait_for(lambda: parts(work, "driver") >= 3, job)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    done = parts(work, "driver")
    (work / "driver" / "m" / ".part-000099.abcdefgh.parquet").write_bytes(b"half of a part")  # as a kill may leave
    before = {path: path.stat().st_mtime_ns for path in (work / "driver" / "m").glob("part-*")}
    said = finish(start(work, "driver"))
    predicted = re.search(r"(\d+) images, (\d+) errors, (\d+) predicted now", said)
    assert predicted and [int(n) for n in predicted.groups()] == [IMAGES, IMAGES // 100, IMAGES - PART * done]
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    check(work, "driver")


CLUSTER = """
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
input()
cluster.remove_node(nodes[0], allow_graceful=False)
print(flush=True)
input()
cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[tuple[str, Callable[[], None]]]:
    """A head and two more nodes, of a CPU each, on this machine: the address, and what removes one of the two."""
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}  # as the job's; of its own Ray only the node itself has the token
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def remove_node() -> None:
            stdin.write("\n")
            stdin.flush()
            assert stdout.readline(), "the cluster has ended"

        yield stdout.readline().strip(), remove_node
        stdin.write("\n")


def workers(title: str) -> list[int]:
    """The cluster's processes of a title."""
    return [process.pid for process in tree(os.getpid()) if process.command().startswith(title)]


def test_an_actor_a_task_and_a_node(work: Path, cluster: tuple[str, Callable[[], None]]) -> None:
    """On a cluster, with decoding in tasks: first the listing or a decoding task, then an actor, then a whole node."""
    address, remove_node = cluster
    actors = ["actors.min_actors=2", "actors.threads=1"]
    job = start(work, "cluster", "decode=tasks", *actors, address=address)
    for at_least, title in [(0, "ray::MapBatches"), (3, "ray::MapWorker")]:
        wait_for(lambda: parts(work, "cluster") >= at_least, job)  # noqa: B023 - it is called at once
        (victim,) = wait_for(lambda: workers(title)[:1], job)  # noqa: B023
        os.kill(victim, signal.SIGKILL)
    wait_for(lambda: parts(work, "cluster") >= 6, job)
    remove_node()
    assert parts(work, "cluster") < IMAGES // PART
    finish(job)
    check(work, "cluster")
