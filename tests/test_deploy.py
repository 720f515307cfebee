"""The deployment files: the image's Dockerfile, the RayService manifest, and the config that it holds.

No Docker and no KubeRay here. Pods are checked by the models of Kubernetes' own client, serveConfigV2 by Ray's
schema, groups by Ray's autoscaler for KubeRay, and the fields between by those of KubeRay's API reference, below.
"""

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from artifacts import write_classifier, write_detector
from kubernetes import client
from pydantic import BaseModel, ConfigDict, Field

from backbones.config import load_config
from serving.config import ServedModel, ServedVersion, ServingConfig
from serving.service.environment import COMMON, FAST

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/serving/cluster.yaml"
TARGETS = ("cpu", "cuda")
# A lone machine's: a cluster's load balancers have to hear of a node's end.
LOCAL = {name for name in FAST if "DRAINING" in name}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Autoscaler(Strict):
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    idleTimeoutSeconds: int = 60
    version: Literal["v1", "v2"] | None = None
    image: str | None = None
    imagePullPolicy: str | None = None
    resources: dict[str, Any] | None = None
    env: list[dict[str, Any]] = []


class Group(Strict):
    rayStartParams: dict[str, str]  # strings: `num-cpus: 0` would be refused
    template: dict[str, Any]


class Head(Group):
    serviceType: str | None = None
    enableIngress: bool = False


class Workers(Group):
    groupName: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    replicas: int = 0
    minReplicas: int = 0
    maxReplicas: int = 2**31 - 1
    numOfHosts: int = 1
    idleTimeoutSeconds: int | None = None


class Cluster(Strict):
    rayVersion: str
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: Autoscaler | None = None
    headGroupSpec: Head
    workerGroupSpecs: list[Workers] = []


class Upgrade(Strict):
    type: Literal["NewCluster", "None"]


class Spec(Strict):
    serveConfigV2: str
    rayClusterConfig: Cluster
    excludeHeadPodFromServeSvc: bool = False
    upgradeStrategy: Upgrade | None = None


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: dict[str, Any]
    spec: Spec


@pytest.fixture(scope="module")
def documents() -> tuple[RayService, dict[str, Any]]:
    ray, grpc = yaml.safe_load_all((ROOT / "deploy/rayservice.yaml").read_text())
    return RayService.model_validate(ray), grpc


@pytest.fixture(scope="module")
def service(documents: tuple[RayService, dict[str, Any]]) -> RayService:
    return documents[0]


def groups(service: RayService) -> list[Head | Workers]:
    cluster = service.spec.rayClusterConfig
    return [cluster.headGroupSpec, *cluster.workerGroupSpecs]


def container(group: Group) -> dict[str, Any]:
    (only,) = group.template["spec"]["containers"]
    return only


def in_new_process(code: str, *args: str) -> Any:
    """What the code prints, as JSON: Ray's constants are read on import, and other tests set them first."""
    command = [sys.executable, "-c", code, *args]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **FAST})
    return json.loads(result.stdout.splitlines()[-1])


READ_BY_RAY = """
import contextlib, io, json, sys
import yaml
from backbones.config import load_config
from backbones.errors import InputError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema
from serving.config import ServingConfig
from serving.__main__ import main
from serving.deploy import serve_config

with contextlib.redirect_stdout(io.StringIO()) as printed:
    main(["deploy-config", sys.argv[1]])
made = yaml.safe_load(printed.getvalue())
kept = ServeDeploySchema.model_validate(made).model_dump(mode="json", exclude_unset=True)
try:
    serve_config(load_config(ServingConfig, sys.argv[1], ["models.1.artifact=runs/a.onnx"]))
except InputError as error:
    relative = str(error)
silent = serve_config(load_config(ServingConfig, sys.argv[1], ["grpc_port=null"]))
cluster = {"metadata": {"name": "a", "namespace": "b"}, "spec": json.loads(sys.argv[2])}
nodes = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
print(json.dumps({"made": made, "kept": kept, "relative": relative, "silent": silent, "nodes": nodes}))
"""


@pytest.fixture(scope="module")
def read_by_ray(service: RayService) -> dict[str, Any]:
    return in_new_process(READ_BY_RAY, str(CONFIG), service.spec.rayClusterConfig.model_dump_json(exclude_unset=True))


def test_serve_config_is_the_manifests_and_rays_schema_knows_every_key(service, read_by_ray):
    assert yaml.safe_load(service.spec.serveConfigV2) == read_by_ray["made"]
    assert read_by_ray["kept"] == read_by_ray["made"]  # the schema drops what it does not know


def test_grpc_is_on_if_the_config_has_its_port(read_by_ray):
    assert "grpc_options" not in read_by_ray["silent"]
    assert read_by_ray["made"]["grpc_options"] == {
        "port": 8001,
        "grpc_servicer_functions": ["serving.service.grpc_service:add_to_server"],
        "request_timeout_s": 31,  # a second above the longest of the models
        "enable_reflection": False,
    }


def test_grpc_reaches_every_pod_that_serves(documents):
    service, grpc = documents
    client.V1Service.model_validate(grpc, strict=True)
    (port,) = grpc["spec"]["ports"]
    assert port["port"] == load_config(ServingConfig, CONFIG).grpc_port
    head, *workers = groups(service)
    assert grpc["spec"]["selector"].items() <= workers[0].template["metadata"]["labels"].items()
    assert "metadata" not in head.template  # it has no replica, and so no port
    for group in workers:
        assert group.template["metadata"] == workers[0].template["metadata"]
        assert {"name": port["targetPort"], "containerPort": port["port"]} in container(group)["ports"]


def test_an_artefact_has_one_path_on_every_node(read_by_ray):
    assert "'detector': artifact runs/a.onnx must be an absolute path" in read_by_ray["relative"]


def test_rays_autoscaler_finds_the_groups_with_their_bounds_and_gpus(read_by_ray):
    nodes = read_by_ray["nodes"]
    assert {name: (node["min_workers"], node["max_workers"]) for name, node in nodes.items()} == {
        "headgroup": (0, 0), "cpu": (1, 8), "gpu": (0, 4)
    }  # fmt: skip
    assert [nodes[name]["resources"]["CPU"] for name in ("headgroup", "cpu", "gpu")] == [0, 4, 8]
    assert nodes["gpu"]["resources"]["GPU"] == 1 and "GPU" not in nodes["cpu"]["resources"]


BUILD = """
import json, sys
from pathlib import Path
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from serving.config import ServingConfig
from serving.deploy import serve_config

config = ServingConfig.model_validate_json(sys.argv[1])
built = []
for application in serve_config(config)["applications"]:
    deployment = build(import_attr(application["import_path"]), application["args"])._bound_deployment
    options = deployment.ray_actor_options
    built.append([application["route_prefix"], deployment.name, deployment.num_replicas, options["num_cpus"],
                  deployment.init_kwargs.get("max_body_bytes"), deployment.init_kwargs.get("version")])
print(json.dumps(built))
"""


def test_ray_builds_from_the_config_what_a_lone_machine_serves(tmp_path):
    config = ServingConfig(
        max_body_bytes=1234,
        models=(
            ServedModel(name="a", artifact=str(write_classifier(tmp_path / "a.onnx")), replicas=3, num_cpus=2),
            ServedModel(
                name="b",
                versions=(
                    ServedVersion(version="1", artifact=str(write_detector(tmp_path / "b.onnx")), weight=0.1),
                    ServedVersion(version="2", artifact=str(tmp_path / "b.onnx"), weight=0.9),
                ),
            ),
        ),
    )
    assert in_new_process(BUILD, config.model_dump_json()) == [
        ["/v2/models/a", "a", 3, 2, 1234, "1"],
        ["/v2/models/b", "b", 1, 1, 1234, "2"],
        ["/v2/models/b/versions/1", "b", 1, 1, 1234, "1"],
        ["/", "front", 1, 0, None, None],
    ]


def test_pods_are_what_kubernetes_knows(service):
    for group in groups(service):
        client.V1PodTemplateSpec.model_validate(group.template, strict=True)
    broken = json.loads(json.dumps(groups(service)[0].template).replace("readinessProbe", "readynessProbe"))
    with pytest.raises(ValueError, match="readynessProbe"):
        client.V1PodTemplateSpec.model_validate(broken, strict=True)


def test_every_node_has_rays_flags_the_artefacts_and_probes(service):
    wanted = {**COMMON, **{name: value for name, value in FAST.items() if name not in LOCAL}}
    assert {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"} <= wanted.keys() and LOCAL
    models = load_config(ServingConfig, CONFIG).models
    folders = {str(Path(version.artifact).parent) for model in models for version in model.served}
    for group in groups(service):
        pod, box = group.template["spec"], container(group)
        env = {entry["name"]: entry["value"] for entry in box["env"]}
        assert wanted.items() <= env.items()
        assert not LOCAL & env.keys()
        mounts = {mount["mountPath"]: mount for mount in box["volumeMounts"]}
        assert folders <= mounts.keys() and all(mounts[folder]["readOnly"] for folder in folders)
        assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
        assert not mounts[env["CSPNET_CACHE"]].get("readOnly")
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= box.keys()
        assert pod["securityContext"]["runAsNonRoot"]
        assert box["resources"]["requests"] == box["resources"]["limits"]
    ports = [container(group)["readinessProbe"]["httpGet"]["port"] for group in groups(service)]
    assert ports[1:] == [load_config(ServingConfig, CONFIG).port] * 2  # a worker is ready when its proxy is
    assert ports[0] != ports[1]  # the head has none


def test_replicas_fit_the_pods_and_their_images(service):
    cluster = service.spec.rayClusterConfig
    assert cluster.enableInTreeAutoscaling
    assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    assert cluster.rayVersion == version("ray")
    capacity = {group.groupName: container(group)["resources"]["limits"] for group in cluster.workerGroupSpecs}
    assert all(group.minReplicas <= group.replicas <= group.maxReplicas for group in cluster.workerGroupSpecs)
    images = {group.groupName: container(group)["image"] for group in cluster.workerGroupSpecs}
    assert images == {"cpu": "cspnet:cpu", "gpu": "cspnet:cuda"}
    for model in load_config(ServingConfig, CONFIG).models:
        limits = capacity["gpu" if model.num_gpus else "cpu"]
        assert model.num_cpus <= float(limits["cpu"])
        assert model.num_gpus <= float(limits.get("nvidia.com/gpu", 0))


Instruction = tuple[str, str]


def read_dockerfile() -> tuple[str, dict[str, tuple[str, list[Instruction]]]]:
    """The last stage's name, and by name each stage's base and instructions."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "deploy/Dockerfile").read_text(), flags=re.MULTILINE)
    stages: dict[str, tuple[str, list[Instruction]]] = {}
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.split()
            assert name not in stages
            stages[name] = (base, [])
        else:
            stages[name][1].append((word, rest.strip()))
    return name, stages


def instructions(target: str) -> list[Instruction]:
    """Those of a stage, and before them those of the stages that it goes on from."""
    base, own = read_dockerfile()[1][target]
    return [*(instructions(base) if base in read_dockerfile()[1] else []), *own]


def last(target: str, word: str) -> str:
    return [rest for name, rest in instructions(target) if name == word][-1]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_serves_as_no_root_and_says_how_it_is(target):
    assert last(target, "USER").split(":")[0].isdecimal() and last(target, "USER") != "0:0"
    assert json.loads(last(target, "ENTRYPOINT")) == ["python", "-m", "serving", "run"]
    assert last(target, "EXPOSE") == "8000"
    path, *overrides = json.loads(last(target, "CMD"))
    written = CONFIG.with_name("local.yaml")
    assert path.endswith(".yaml") and load_config(ServingConfig, written, overrides).host == "0.0.0.0"
    assert not [rest for word, rest in instructions(target) if word == "RUN" and "uv sync" in rest]  # nor its cache
    assert f"--from=build-{target} /opt/cspnet /opt/cspnet" in last(target, "COPY")
    assert "UV_PROJECT_ENVIRONMENT=/opt/cspnet" in last(f"build-{target}", "ENV")


def test_the_default_target_is_the_cpus_and_bases_are_official_images():
    name, stages = read_dockerfile()
    assert name == "cpu" and set(TARGETS) <= stages.keys()
    bases = {base for base, _ in stages.values()} - stages.keys()
    assert bases == {"python:3.11-slim"}


def test_what_the_image_copies_is_there_and_reaches_the_build():
    rules = (ROOT / ".dockerignore").read_text().split()
    assert rules[0] == "*"
    sources = [
        source
        for word, rest in instructions("build")
        if word == "COPY"
        for source in rest.split()[:-1]
    ]  # fmt: skip
    assert {"uv.lock", "pyproject.toml", "backbones", "detection", "serving", "configs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and f"!{source}" in rules
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(sources)


def left_out(target: str) -> set[str]:
    """Packages of the lock that a target's environment does without."""
    arguments = {}
    for word, rest in instructions(f"build-{target}"):
        if word == "ARG":
            key, value = rest.split("=", maxsplit=1)
            arguments[f"${key}"] = value.strip('"').split()
    command = next(shlex.split(rest) for word, rest in instructions(f"build-{target}") if "uv sync" in rest)
    assert {"--locked", "--no-dev", "--no-editable", "--extra=otel"} <= set(command)
    flags = [flag for part in command for flag in arguments.get(part, [])]
    assert all(flag.startswith("--no-install-package=") for flag in flags)
    return {flag.split("=")[1] for flag in flags}


def test_images_hold_what_they_run_on_and_no_more():
    locked = set(re.findall(r'^name = "(.+)"', (ROOT / "uv.lock").read_text(), flags=re.MULTILINE))
    assert left_out("cpu") <= locked and left_out("cuda") <= locked
    assert {"torch", "torchvision"} <= left_out("cuda")
    nvidia = {name for name in locked if name.startswith(("nvidia-", "cuda-"))}
    assert nvidia <= left_out("cpu")
    named = {re.split(r"[~<>=! ;\[]", line)[0] for line in requires("onnxruntime-gpu") or [] if "extra ==" in line}
    wanted = {name for name in named if name.startswith("nvidia-")}
    assert wanted and nvidia - left_out("cuda") == wanted | {"nvidia-cublas"}  # which cuDNN asks for


@pytest.mark.parametrize("status, code", [(200, 0), (503, 1)])
def test_the_health_check_asks_whether_all_models_are_ready(status, code):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    command = json.loads(last("cpu", "HEALTHCHECK").split(" CMD ")[1])
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert command[0] == "python" and "8000" in command[2]
        check = command[2].replace("8000", str(server.server_port))
        assert subprocess.run([sys.executable, "-c", check], timeout=30).returncode == code
    assert asked == ["/v2/health/ready"]


def test_the_dashboard_shows_what_is_measured():
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    measured = {}
    for kind, name in re.findall(
        r'(Counter|Gauge|Histogram)\(\s*"(\w+)"', (ROOT / "serving/service/metrics.py").read_text()
    ):
        endings = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}[kind]
        measured[name] = {f"ray_{name}{ending}" for ending in endings}
    shown = {
        name for panel in dashboard["panels"] for t in panel["targets"] for name in re.findall(r"ray_\w+", t["expr"])
    }
    assert shown <= set.union(*measured.values())
    assert all(shown & names for names in measured.values())
