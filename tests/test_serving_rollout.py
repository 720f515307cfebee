"""Versions side by side and new ones in place of old ones, on a real Ray Serve, under load."""

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http
from artifacts import keep_answer, picture, write_classifier, write_detector
from pydantic import ValidationError
from services import Started, started_of, within

from backbones.errors import InputError
from serving.artifact import read_whole, write_artifact
from serving.client import Client
from serving.config import ServedModel, ServedVersion, ServingConfig
from serving.service.versions import HEADER

WEIGHTS = {"1": 0.75, "2": 0.25}
ASKED = 400  # requests over which shares are counted


@dataclass
class Updated(Started):
    folder: Path
    config: ServingConfig

    def ask(self, path: str, colour: str = "red") -> httpx.Response:
        return self.post(path, picture(colour))

    def update(self, **models: ServedModel) -> None:
        """Roll out other models under names of those that are served."""
        changed = tuple(models.get(model.name, model) for model in self.config.models)
        config = self.config.model_copy(update={"models": changed})
        self.service.update(config)
        self.config = config


def single(artifact: Path, **settings: object) -> ServedModel:
    return ServedModel(name="single", artifact=str(artifact), num_cpus=0.1, **settings)  # type: ignore[arg-type]


def several(*versions: ServedVersion) -> ServedModel:
    return ServedModel(name="several", versions=versions, num_cpus=0.1, timeout_s=10)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Updated]:
    folder = tmp_path_factory.mktemp("artifacts")
    one, two, hanging = (
        str(keep_answer(write_classifier(folder / f"{name}.onnx", name=name, hangs=name == "hanging")))
        for name in ("one", "two", "hanging")
    )
    config = ServingConfig(
        port=0,
        start_timeout_s=300,
        models=(
            single(folder / "one.onnx"),
            several(
                ServedVersion(version="2", artifact=two, weight=WEIGHTS["2"]),
                ServedVersion(version="1", artifact=one, weight=WEIGHTS["1"]),
                ServedVersion(version="3", artifact=hanging, shadow=1),
            ),
        ),
    )
    with started_of(config) as service:
        yield Updated(**vars(service), folder=folder, config=config)


def test_each_version_has_its_share(started):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: started.ask("several/classify"), range(ASKED)))
    assert {answer.status_code for answer in answers} == {200}
    shares = Counter(answer.headers[HEADER] for answer in answers)
    assert Counter({"one": "1", "two": "2"}[answer.json()["model"]] for answer in answers) == shares
    spread = (ASKED * WEIGHTS["1"] * WEIGHTS["2"]) ** 0.5  # the binomial distribution's
    assert abs(shares["2"] - ASKED * WEIGHTS["2"]) < 5 * spread
    assert shares.total() == ASKED and shares["3"] == 0


def test_a_version_is_asked_by_its_name(started):
    for version, name in (("1", "one"), ("2", "two"), ("3", "hanging")):
        answers = [started.ask(f"several/versions/{version}/classify") for _ in range(8)]
        assert {(answer.headers[HEADER], answer.json()["model"]) for answer in answers} == {(version, name)}
    missing = started.ask("several/versions/9/classify")
    assert missing.status_code == 404 and "there is 1, 2, 3" in missing.json()["error"]


def test_the_protocol_knows_all_versions(started):
    triton = tritonclient.http.InferenceServerClient(started.service.url.removeprefix("http://"))
    about = triton.get_model_metadata("several")
    assert about["versions"] == ["1", "2", "3"]
    index = {(row["name"], row["version"]): row["state"] for row in triton.get_model_repository_index()}
    assert index == {("single", "1"): "READY", **{("several", version): "READY" for version in "123"}}
    assert [triton.is_model_ready("several", version) for version in ("1", "2", "3", "9")] == [True] * 3 + [False]
    images = tritonclient.http.InferInput("images", [1], "BYTES")
    for version in ("1", "2"):
        images.set_data_from_numpy(np.array([picture("red")], object))
        assert triton.infer("several", [images], version).get_response()["model_version"] == version
    triton.close()
    assert started.http.get("/v2/health/ready").status_code == 200
    with Client(started.service.url) as client:
        assert client.artifact("several", 2).model == "two"


def test_a_bad_request_is_refused_by_whichever_version_gets_it(started):
    answers = [started.http.post("/v2/models/several/classify", content=b"no image") for _ in range(24)]
    assert {answer.status_code for answer in answers} == {422}
    assert {started.http.post("/v2/models/several/detect", content=b"x").status_code for _ in range(24)} == {400}


def metric(started: Started, name: str, **tags: str) -> float:
    """The sum of a metric's values with these tags, as Prometheus reads them."""
    rows = re.findall(rf"^ray_{name}{{(.*)}} (\S+)$", started.prometheus(), re.MULTILINE)
    return sum(float(value) for said, value in rows if all(f'{tag}="{is_}"' in said for tag, is_ in tags.items()))


@pytest.mark.slow
def test_a_shadow_that_hangs_hurts_nobody_and_is_replaced(started):
    (before,) = replicas("several@3")
    assert {started.ask("several/classify").status_code for _ in range(6)} == {200}
    within(60, lambda: metric(started, "cspnet_shadow_copies_total", version="3", outcome="answered") > 0)
    for _ in range(6):
        answer = started.ask("several/classify", "white")
        assert answer.status_code == 200 and answer.elapsed.total_seconds() < 8
    within(60, lambda: metric(started, "cspnet_shadow_copies_total", version="3", outcome="failed") > 0)
    assert metric(started, "cspnet_requests_total", application="several@3", action="classify", code="200") > 0
    within(180, lambda: replicas("several@3") not in ([], [before]))
    within(120, lambda: started.ask("several/versions/3/classify").status_code == 200)


def applications() -> dict[str, Any]:
    from ray import serve  # not before `start` has set what it reads

    return serve.status().applications


def replicas(application: str) -> list[str]:
    from ray import serve

    details = serve.context._global_client.get_serve_details()["applications"][application]["deployments"]["several"]
    return [replica["replica_id"] for replica in details["replicas"] if replica["state"] == "RUNNING"]


@dataclass
class Load:
    """What clients of one path were answered: a version, or what failed, and when they asked."""

    answers: list[tuple[float, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def load(started: Started, *paths: str) -> Iterator[dict[str, Load]]:
    """For each path two clients that ask without end, one over a connection that it keeps and one over new ones."""
    over = threading.Event()
    found = {path: Load() for path in paths}

    def ask(path: str, keeps: bool) -> None:
        with httpx.Client(timeout=60, trust_env=False) as http:
            while not over.is_set():
                began = time.monotonic()
                try:
                    post = http.post if keeps else httpx.post
                    answer = post(
                        f"{started.service.url}/v2/models/{path}/classify", content=picture("red"), timeout=60
                    )
                except httpx.HTTPError as error:
                    found[path].failures.append(repr(error))
                    continue
                if answer.status_code == 200:
                    found[path].answers.append((began, answer.json()["model"]))
                else:
                    found[path].failures.append(f"{answer.status_code} {answer.text}")

    clients = [threading.Thread(target=ask, args=(path, keeps)) for path in paths for keeps in (True, False)]
    for client in clients:
        client.start()
    try:
        yield found
    finally:
        over.set()
        for client in clients:
            client.join()


def test_rolling_upgrade_under_load(started):
    """A new artefact; one version promoted and the others gone: nobody is refused, and then all is new."""
    two = started.folder / "two.onnx"
    with load(started, "single", "several", "several/versions/2") as found:
        within(30, lambda: all(len(path.answers) > 10 for path in found.values()))
        started.update(
            single=single(two),
            several=several(ServedVersion(version="2", artifact=str(two))),
        )
        done = time.monotonic()
        assert started.http.get("/v2/health/ready").status_code == 200
        within(60, lambda: all({name for at, name in path.answers[-20:]} == {"two"} for path in found.values()))
        late = time.monotonic()
        time.sleep(2)
    assert late - done < 30
    for path in found.values():
        assert not path.failures
        assert {name for at, name in path.answers if at > late} == {"two"}
    assert {name for _, name in found["single"].answers} == {"one", "two"}
    assert started.ask("several/versions/1/classify").status_code == 404
    assert set(applications()) == {"single", "several", "_front"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "no artefact at"),
        ("task", "the new artefact is for detection, and the model is for classification"),
        ("self-test", "fails its self-test on CPUExecutionProvider: logits differ by"),
        ("changed", "was changed: its SHA-256 is"),
        ("port", "port is 1 and was"),
        ("timeout", "timeout_s of 99 is above"),
        ("replica", "takes images as uint8 \\[1, any, any, 3\\], not uint8 \\[8,"),
    ],
)
def test_what_is_bad_leaves_the_old_one_serving(started, change, words):
    before = started.ask("single/classify").json()
    old = Path(started.config.models[0].artifact)
    bad = started.folder / f"{change}.onnx"
    config = started.config.model_copy(update={"port": 1 if change == "port" else 0})
    settings = {"timeout_s": 99} if change == "timeout" else {}
    if change == "task":
        write_detector(bad)
    elif change == "self-test":
        _, graph, artifact, _ = read_whole(keep_answer(write_classifier(bad)))
        kept = artifact.self_test.model_copy(update={"values": (30, 20, 10)})
        write_artifact(graph, artifact.model_copy(update={"self_test": kept}), bad)
    elif change == "changed":
        bad.write_bytes(old.read_bytes().replace(b"classification", b"clossification"))
    elif change == "replica":  # it passes the checks here: only a replica warms up with eight
        write_classifier(bad, batch=1)
    elif change != "missing":
        bad.write_bytes(old.read_bytes())
    models = (single(bad, **settings), *config.models[1:])
    with load(started, "single") as found:
        with pytest.raises(InputError, match=words) as caught:
            started.service.update(config.model_copy(update={"models": models}))
        within(30, lambda: len(found["single"].answers) > 20)
    assert "\n" not in str(caught.value)
    assert not found["single"].failures
    assert {name for _, name in found["single"].answers} == {before["model"]}
    assert applications()["single"].status == "RUNNING"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "give either artifact or versions"),
        ({"artifact": "a.onnx", "versions": [{"version": "1", "artifact": "a.onnx"}]}, "either artifact or versions"),
        ({"versions": [{"version": "1", "artifact": "a"}, {"version": 1, "artifact": "b"}]}, "two versions have one"),
        ({"versions": [{"version": "1", "artifact": "a", "shadow": 1}]}, "no version has a weight above 0"),
        ({"versions": [{"version": "1", "artifact": "a", "weight": 1, "shadow": 1}]}, "weight and shadow exclude"),
        ({"versions": [{"version": "a/b", "artifact": "a"}]}, "pattern"),
    ],
)
def test_versions_that_do_not_go_together(values, words):
    with pytest.raises(ValidationError, match=words):
        ServedModel.model_validate({"name": "a", **values})


@pytest.mark.parametrize(("name", "version"), [("a_2_b", None), ("a_2", "b")])
def test_names_that_haproxy_would_mix_up(name, version):
    def versions(second):
        return [{"version": "1", "artifact": "a"}, {"version": second, "artifact": "b", "weight": 0.1}]

    other = {"artifact": "c"} if version is None else {"versions": versions(version)}
    models = [{"name": "a", "versions": versions("2_b")}, {"name": name, **other}]
    with pytest.raises(ValidationError, match="HAProxy would know two models or versions as 'a_2_b'"):
        ServingConfig.model_validate({"models": models})
