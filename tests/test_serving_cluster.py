"""A service on a Ray cluster that RAY_ADDRESS names; its second node is another raylet on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from artifacts import picture, write_classifier

SCRIPT = """
import json, os, sys, threading, time
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
os.environ["RAY_ADDRESS"] = cluster.address

from serving.client import Client
from serving.config import Autoscaling, ServedModel, ServingConfig
from serving.serve import start

artifact, image = sys.argv[1:]
scaling = Autoscaling(max_replicas=2, target_ongoing_requests=1, upscale_delay_s=0)
model = ServedModel(name="model", artifact=artifact, autoscaling=scaling, num_cpus=1)
labels, over = [], threading.Event()

def ask(url):
    with Client(url) as client:
        while not over.is_set():
            labels.append(client.classify("model", image)["predictions"][0]["label"])

def nodes():
    from ray.serve.context import _get_global_client

    deployment = _get_global_client().get_serve_details()["applications"]["model"]["deployments"]["model"]
    return [replica["node_id"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"]

with start(ServingConfig(port=0, models=(model,)), lambda line: None) as service:
    before = nodes()
    clients = [threading.Thread(target=ask, args=(service.url,)) for _ in range(4)]
    for client in clients:
        client.start()
    cluster.add_node(num_cpus=1)  # the head has no CPU left
    deadline = time.monotonic() + 120
    while len(nodes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    after = nodes()
    over.set()
    for client in clients:
        client.join()
print(json.dumps({"before": before, "after": after, "labels": labels}))
import ray

ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_second_node_joins_and_takes_a_replica(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(picture("red"))
    artifact = write_classifier(tmp_path / "m.onnx", work=20)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(artifact), str(tmp_path / "image.png")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=env | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said["before"]) == 1 and len(said["after"]) == len(set(said["after"])) == 2
    assert len(said["labels"]) > 10 and set(said["labels"]) == {"red"}
