"""Replicas that follow the load, on a real Ray Serve."""

import threading
import time
from pathlib import Path

import httpx
import pytest
from artifacts import picture, write_classifier
from ray import serve

from serving.config import Autoscaling, ServedModel, ServingConfig
from serving.serve import start


def replicas() -> int:
    (deployment,) = serve.status().applications["model"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def wait_for(count: int, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while replicas() != count:
        assert time.monotonic() < deadline, f"{replicas()} replicas, not {count}, after {within_s} s"
        time.sleep(0.5)


@pytest.mark.slow
def test_from_one_to_two_to_none_and_back(tmp_path: Path) -> None:
    scaling = Autoscaling(
        min_replicas=0, max_replicas=2, target_ongoing_requests=1, upscale_delay_s=0, downscale_delay_s=1
    )
    artifact = str(write_classifier(tmp_path / "m.onnx", work=20))
    model = ServedModel(name="model", artifact=artifact, autoscaling=scaling, num_cpus=0.1)
    statuses: list[int] = []
    over = threading.Event()

    def ask(url: str) -> None:
        with httpx.Client(timeout=60) as http:
            while not over.is_set():
                statuses.append(http.post(f"{url}/v2/models/model/classify", content=picture("red")).status_code)

    with start(ServingConfig(port=0, models=(model,))) as service:
        assert replicas() <= 1
        clients = [threading.Thread(target=ask, args=(service.url,)) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            wait_for(2, within_s=120)
        finally:
            over.set()
            for client in clients:
                client.join()
        wait_for(0, within_s=180)
        assert httpx.get(f"{service.url}/v2/health/ready").status_code == 200  # since it would answer
        answer = httpx.post(f"{service.url}/v2/models/model/classify", content=picture("red"), timeout=60)
        assert answer.json()["predictions"][0]["label"] == "red"  # by a new replica, which may be gone again by now
    assert len(statuses) > 10 and set(statuses) == {200}
