"""A service on a Ray cluster: Ray Serve's config for it, and the builders that the config names; no torch here.

`serve deploy` and KubeRay's RayService import a builder on the cluster and give it the application's `args`, which are
a `ServingConfig` again: what `python -m serving run` starts on one machine is what starts there.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from ray import serve

from backbones.errors import InputError
from serving.config import ServedModel, ServingConfig, refuse_files
from serving.service.applications import application_names, build
from serving.service.grpc_service import FRONT, grpc_options

_OF_THE_SERVER = {"host", "port", "grpc_port", "start_timeout_s"}  # not of an application


def serve_config(config: ServingConfig) -> dict[str, Any]:
    """What `ray.serve.schema.ServeDeploySchema` takes. Nothing is opened: the artefacts need not be on this machine.

    Raises:
        InputError: an artefact's path that is not absolute, so that it would depend on the node; a file of keys or log.
    """
    refuse_files(config)
    for model in config.models:
        for version in model.served:
            if not PurePosixPath(version.artifact).is_absolute():
                raise InputError(
                    f"model {model.name!r}: artifact {version.artifact} must be an absolute path, "
                    "the same on every node"
                )
    grpc = {}
    if config.grpc_port is not None:
        grpc["grpc_options"] = grpc_options(config.grpc_port, config.request_timeout_s)
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": config.host,
            "port": config.port,
            "request_timeout_s": config.request_timeout_s,
        },
        **grpc,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            *(application for model in config.models for application in _model_applications(config, model)),
            _application(FRONT, "/", "front_application", config),
        ],
    }


def model_application(config: ServingConfig) -> serve.Application:
    """The application of the one model of `config`.

    Raises:
        InputError: its artefact is missing or broken.
    """
    return build(config)[0].application


class VersionConfig(ServingConfig):
    """The config of one model, and which of its further versions is meant."""

    version: str


def version_application(config: VersionConfig) -> serve.Application:
    """The application of a further version of the one model of `config`.

    Raises:
        InputError: an artefact is missing or broken.
    """
    name, _ = application_names(config.models[0])[config.version]
    return next(application.application for application in build(config) if application.name == name)


def front_application(config: ServingConfig) -> serve.Application:
    """The application in front of all models of `config`.

    Raises:
        InputError: an artefact is missing or broken.
    """
    return build(config)[-1].application


def _model_applications(config: ServingConfig, model: ServedModel) -> Iterator[dict[str, Any]]:
    alone = config.model_copy(update={"models": (model,)})
    for i, (version, (name, prefix)) in enumerate(application_names(model).items()):
        application = _application(name, prefix, "version_application" if i else "model_application", alone)
        if i:
            application["args"]["version"] = version
        yield application


def _application(name: str, prefix: str, builder: str, config: ServingConfig) -> dict[str, Any]:
    args = config.model_dump(mode="json", exclude_defaults=True, exclude=_OF_THE_SERVER)
    return {"name": name, "route_prefix": prefix, "import_path": f"{__name__}:{builder}", "args": args}
