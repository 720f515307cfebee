"""The RayJob manifest of a batch job: held against the same models as the service's, and against the job's config."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from kubernetes import client
from pydantic import Field
from test_deploy import READ_BY_RAY, ROOT, Cluster, Strict, container, in_new_process

from backbones.config import load_config
from serving.jobs.config import BatchConfig

CONFIG = ROOT / "configs/batch/cluster.yaml"
NODES = "import contextlib" + READ_BY_RAY.partition("import contextlib")[2].partition("with contextlib")[0]
NODES += """
cluster = {"metadata": {"name": "a", "namespace": "b"}, "spec": json.loads(sys.argv[1])}
print(json.dumps(_derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]))
"""


class JobSpec(Strict):
    """Fields of KubeRay's API reference."""

    entrypoint: str
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = 0
    backoffLimit: int = Field(default=0, ge=0)
    activeDeadlineSeconds: int | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    runtimeEnvYAML: str | None = None
    rayClusterSpec: Cluster


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[str, Any]
    spec: JobSpec


@pytest.fixture(scope="module")
def documents() -> tuple[dict[str, Any], RayJob]:
    config, job = yaml.safe_load_all((ROOT / "deploy/rayjob.yaml").read_text())
    return config, RayJob.model_validate(job)


def test_the_manifest_holds_the_config_and_runs_it(documents, tmp_path):
    config_map, job = documents
    client.V1ConfigMap.model_validate(config_map, strict=True)
    ((name, text),) = config_map["data"].items()
    (tmp_path / name).write_text(text)
    assert load_config(BatchConfig, tmp_path / name) == load_config(BatchConfig, CONFIG)
    head = job.spec.rayClusterSpec.headGroupSpec
    mounts = {mount["name"]: mount["mountPath"] for mount in container(head)["volumeMounts"]}
    assert job.spec.entrypoint == f"python -m serving batch {mounts['config']}/{name}"
    volumes = {volume["name"]: volume for volume in head.template["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]


def test_pods_are_what_kubernetes_knows_and_see_what_the_job_reads(documents):
    cluster = documents[1].spec.rayClusterSpec
    config = load_config(BatchConfig, CONFIG)
    for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs):
        client.V1PodTemplateSpec.model_validate(group.template, strict=True)
        box, pod = container(group), group.template["spec"]
        mounts = {mount["mountPath"]: mount for mount in box["volumeMounts"]}
        assert {str(Path(config.input).parent), str(Path(config.models[0].artifact).parent)} <= mounts.keys()
        assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= box.keys()
        env = {entry["name"]: entry["value"] for entry in box["env"]}
        assert not mounts[env["CSPNET_CACHE"]].get("readOnly")
    head = {mount["mountPath"]: mount for mount in container(cluster.headGroupSpec)["volumeMounts"]}
    for path in (config.output, config.models[0].results):
        assert not head[str(Path(path).parent)].get("readOnly")


def test_the_job_fits_the_pods(documents):
    cluster = documents[1].spec.rayClusterSpec
    nodes = in_new_process(NODES, cluster.model_dump_json(exclude_unset=True))
    assert {name: (node["min_workers"], node["max_workers"]) for name, node in nodes.items()} == {
        "headgroup": (0, 0), "cpu": (1, 8), "gpu": (1, 4)
    }  # fmt: skip
    config = load_config(BatchConfig, CONFIG)
    gpus = {name: node["resources"].get("GPU", 0) for name, node in nodes.items()}
    assert config.actors.num_gpus * config.actors.min_actors <= gpus["gpu"] * nodes["gpu"]["min_workers"]
    assert config.actors.num_gpus * config.actors.most == gpus["gpu"] * nodes["gpu"]["max_workers"]
    assert config.decode == "tasks" and nodes["cpu"]["resources"]["CPU"] > 1


def test_a_field_that_kuberay_does_not_know_is_found(documents):
    broken = json.loads(documents[1].model_dump_json())
    broken["spec"]["entryPoint"] = broken["spec"].pop("entrypoint")
    with pytest.raises(ValueError, match="entryPoint"):
        RayJob.model_validate(broken)
