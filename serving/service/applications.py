"""A config to Ray Serve's applications; no torch here.

One a model, or each of its versions, and one in front at `/`. `serving.serve` starts them on this machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve import Deployment
from ray.serve.config import BackpressureConfig

from backbones.errors import InputError
from serving import selftest
from serving.api.protocol import RETRY_AFTER_S
from serving.app import ModelReplica
from serving.config import ServedModel, ServedVersion, ServingConfig
from serving.predictor import create_predictor
from serving.runtime import OnnxModel
from serving.service.front import Entry, Front
from serving.service.grpc_service import FRONT
from serving.service.versions import Route, route_prefix

DRAIN_S = 5.0  # of a replica that ends, beyond what its requests may take


@dataclass(frozen=True)
class ServedApplication:
    """A Ray Serve application, its name and the prefix of its paths.

    Attributes:
        entry: the model's version; None of the application in front.
        settings: two applications with equal ones are the same.
    """

    name: str
    prefix: str
    application: serve.Application
    entry: Entry | None
    settings: object


def build(config: ServingConfig) -> list[ServedApplication]:
    """The applications of a service: those that own models' paths, those of further versions, and the one in front.
    Artefacts are opened here.

    Raises:
        InputError: an artefact is missing or broken, fails its self-test, or is for another task than its model's
            other versions.
    """
    models = [_model_applications(model, config.max_body_bytes) for model in config.models]
    applications = [application for model in models for application in model]
    applications.sort(key=lambda application: application.prefix.count("/"))  # stable
    entries = [application.entry for model in models for application in model if application.entry is not None]
    front = _deployment(Front).options(
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=64,
        max_queued_requests=256,
        max_surge_percent=100,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
    )
    return [*applications, ServedApplication(FRONT, "/", front.bind(entries), None, entries)]


def application_names(model: ServedModel) -> dict[str, tuple[str, str]]:
    """By version the name and the prefix of its application, the heaviest version's first."""
    first, *others = (version.version for version in model.served)
    prefix = route_prefix(model.name)
    further = {version: (f"{model.name}@{version}", f"{prefix}/versions/{version}") for version in others}
    return {first: (model.name, prefix), **further}


def check_artifact(model: str, artifact: str) -> OnnxModel:
    """An artefact, opened on the CPU, wherever it will run.

    Raises:
        InputError: it is missing or broken, finds no detections, or fails its self-test.
    """
    try:
        opened = create_predictor(OnnxModel(artifact, "cpu", threads=1)).model
        selftest.check(opened)
    except InputError as error:
        raise InputError(f"model {model!r}: {error}") from None
    return opened


def _model_applications(model: ServedModel, max_body_bytes: int) -> list[ServedApplication]:
    names = application_names(model)
    routes = [Route(v.version, names[v.version][0], v.share, v.shadow) for v in model.served]
    applications: list[ServedApplication] = []
    first: Entry | None = None
    for version in model.served:
        opened = check_artifact(model.name, version.artifact)
        name, prefix = names[version.version]
        entry = Entry(model.name, version.version, opened.metadata.task, name, version.share > 0)
        first = first or entry
        if entry.task != first.task:
            raise InputError(
                f"model {model.name!r}: {version.artifact} is for {entry.task}, version {first.version} for "
                f"{first.task}: give it another model's name"
            )
        arguments = _arguments(model, version, opened.sha256, routes, max_body_bytes)
        options = _options(model)
        application = _deployment(ModelReplica).options(**options).bind(**arguments)
        applications.append(ServedApplication(name, prefix, application, entry, (options, arguments)))
    return applications


def _options(model: ServedModel) -> dict[str, Any]:
    """Ray Serve's, of a version's deployment."""
    return {
        "name": model.name,
        "num_replicas": None if model.autoscaling else model.replicas,
        "autoscaling_config": model.autoscaling.model_dump() if model.autoscaling else None,
        "ray_actor_options": {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
        "max_ongoing_requests": model.max_ongoing_requests,
        "max_queued_requests": model.max_queued_requests,
        "max_surge_percent": model.max_surge_percent,
        "graceful_shutdown_timeout_s": model.timeout_s + DRAIN_S,
        "backpressure_config": BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        "max_constructor_retry_count": 1,  # a bad artefact stays bad
    }


def _arguments(
    model: ServedModel, version: ServedVersion, sha256: str, routes: Sequence[Route], max_body_bytes: int
) -> dict[str, Any]:
    """A replica's. Further versions know the names of all, and hand nothing on."""
    if version.version != model.served[0].version:
        routes = [Route(route.version, route.application, route.version == version.version) for route in routes]
    return {
        "name": model.name,
        "version": version.version,
        "routes": routes,
        "artifact": version.artifact,
        "sha256": sha256,
        "provider": model.provider,
        "gpu_mem_limit": model.gpu_mem_limit,
        "cuda_graphs": model.cuda_graphs,
        "threads": model.threads,
        "max_batch_size": model.max_batch_size,
        "timeout_s": model.timeout_s,
        "max_body_bytes": max_body_bytes,
    }


def _deployment(body: type) -> Deployment:
    deployment = serve.deployment(body)
    assert isinstance(deployment, Deployment)  # its annotation says otherwise
    return deployment
