"""A service that cannot start says why in one line, and starts nothing; one with API keys asks for them."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from artifacts import picture, write_classifier
from pydantic import ValidationError

from backbones.config import load_config
from backbones.errors import InputError
from serving.client import Client
from serving.config import ServedModel, ServingConfig
from serving.serve import _update, start
from serving.service import environment
from serving.service.environment import find_haproxy
from serving.service.rollout import reason

CONFIG = Path(__file__).parent.parent / "configs/serving/local.yaml"


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Failing leaves no files and no flags."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = _flags()
    yield
    assert not list(folder.iterdir())
    assert _flags() == before


def _flags() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("RAY_SERVE_", "CSPNET_"))}


def _fails(artifact: Path, port: int = 0) -> str:
    with pytest.raises(InputError) as caught:
        start(ServingConfig(port=port, models=(ServedModel(name="a", artifact=str(artifact)),)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_busy_port(tmp_path: Path) -> None:
    artifact = write_classifier(tmp_path / "a.onnx")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert _fails(artifact, port) == f"port {port} is busy: choose another, such as port={port + 1}"


def test_without_haproxy_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_haproxy", lambda: None)
    said: list[str] = []
    model = ServedModel(name="a", artifact=str(tmp_path / "a.onnx"))
    flags = environment.flags(ServingConfig(models=(model,)), tmp_path, said.append)
    assert "without HAProxy" in said[0] and not any("HAPROXY" in name or "THROUGHPUT" in name for name in flags)


def test_bad_artefacts(tmp_path: Path) -> None:
    assert "model 'a': no artefact at " in _fails(tmp_path / "missing.onnx")
    whole = write_classifier(tmp_path / "a.onnx").read_bytes()
    (tmp_path / "short.onnx").write_bytes(whole[:200])
    assert "short.onnx is no ONNX file, or only the beginning of one" in _fails(tmp_path / "short.onnx")
    (tmp_path / "other.onnx").write_bytes(whole.replace(b"cspnet", b"others"))
    assert "carries no cspnet metadata" in _fails(tmp_path / "other.onnx")


def test_reason_is_the_line_that_matters() -> None:
    ours = "Failed to update the deployments ['a'].\nTraceback:\n  raise\nbackbones.errors.InputError: no GPU\n"
    assert reason(["The deployment failed to start 3 times", ours]) == "no GPU"
    assert reason(["Traceback:\n  boom()\nRuntimeError: boom\n\n"]) == "RuntimeError: boom"
    assert reason([""]).startswith("Ray says no more")


def test_config_file() -> None:
    config = load_config(ServingConfig, CONFIG, ["port=0", "models.1.num_gpus=0.5"])
    assert [model.name for model in config.models] == ["classifier", "detector"]
    assert config.models[1].num_gpus == 0.5
    with pytest.raises(InputError, match="did you mean 'models.0.replicas'"):
        load_config(ServingConfig, CONFIG, ["models.0.replica=2"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_batch_size": 128}, "batches would never fill"),
        ({"provider": "cuda"}, "num_gpus above 0"),
        ({"name": "a/b"}, "pattern"),
        ({"replicas": 1, "autoscaling": {"max_replicas": 2}}, "replicas and autoscaling exclude each other"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas 3 is above max_replicas 2"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ServedModel.model_validate({"name": "a", "artifact": "a.onnx", **values})


@pytest.mark.slow
def test_a_service_that_asks_for_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)  # a short one, for sockets
    keys, key = tmp_path / "keys.txt", "not-to-be-guessed"
    keys.write_text(f"tester:{key}\n")
    keys.chmod(0o600)
    model = ServedModel(name="model", artifact=str(write_classifier(tmp_path / "m.onnx")))
    config = ServingConfig(port=0, models=(model,), api_keys=str(keys), rate_limit="2/4")
    with start(config, lambda _: None) as service, httpx.Client(base_url=service.url, trust_env=False) as http:
        assert http.get("/").status_code == http.get("/v2/health/ready").status_code == 200
        for headers in ({}, {"X-API-Key": "not-the-right-one"}):
            refused = http.post("/v2/models/model/classify", content=picture("red"), headers=headers)
            assert refused.status_code == 401 and "API key" in refused.json()["error"]
        with Client(service.url, api_key=key) as client:  # waits as it is told to
            answers = list(client.classify_many("model", [picture("red")] * 8))
        assert {answer["predictions"][0]["label"] for answer in answers} == {"red"}
        answers_after = [http.get("/v2/models/model", headers={"X-API-Key": key}) for _ in range(12)]
        limited = [answer for answer in answers_after if answer.status_code == 429]
        assert limited and limited[0].headers["retry-after"] == "1"


def test_a_defect_in_a_roll_out_ends_no_service(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def update(self, config: object) -> None:
            raise TimeoutError("Ray did not answer")

    _update(Broken(), lambda: None)  # type: ignore[arg-type, return-value]
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "the roll-out failed: TimeoutError, see above; the service goes on"
    assert "Ray did not answer" in said.err


def test_keys_that_are_not_there_are_told_before_ray_starts(tmp_path: Path) -> None:
    model = ServedModel(name="model", artifact=str(write_classifier(tmp_path / "m.onnx")))
    with pytest.raises(InputError, match="cannot read the API keys in"):
        start(ServingConfig(port=0, models=(model,), api_keys=str(tmp_path / "none.txt")))


@pytest.mark.skipif(not find_haproxy(), reason="no HAProxy")
def test_a_path_too_long_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch" / ("x" * 80)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch" / ("x" * 80)))
    with pytest.raises(InputError, match="set TMPDIR"):
        start(ServingConfig(port=0, models=(ServedModel(name="a", artifact=str(write_classifier(tmp_path / "a"))),)))
    (tmp_path / "scratch" / ("x" * 80)).rmdir()
