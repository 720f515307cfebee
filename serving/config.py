"""The config of a service; no torch here."""

from pathlib import Path

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from backbones.errors import InputError
from backbones.schema import Section, repeated
from serving.ingress.access_log import LOG_VARIABLE
from serving.ingress.keys import KEYS_VARIABLE, LIMIT_VARIABLE, RateLimit
from serving.sessions.providers import ON_GPU, Provider, check_gpu_options

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Autoscaling(Section):
    """How many replicas, by the requests that each has under way or waiting; Ray Serve's names and meanings."""

    min_replicas: int = Field(default=1, ge=0)  # with 0 the first request after a pause waits for a start
    max_replicas: int = Field(ge=1)
    target_ongoing_requests: float = Field(default=16, gt=0)  # of each replica: about two batches
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}: swap or equal them"
            )
        return self


class ServedVersion(Section):
    """An artefact under a model's name, beside others."""

    version: str = Field(pattern=_NAME)
    artifact: str
    weight: float = Field(default=1, ge=0)  # its share of the requests that name no version, relative to the others'
    shadow: float = Field(default=0, ge=0, le=1)  # the share of them that it gets copies of, answering nobody

    @model_validator(mode="after")
    def _answers_or_listens(self) -> Self:
        if self.shadow and "weight" in self.model_fields_set:
            raise ValueError("weight and shadow exclude each other: a shadow answers nobody; leave one of them out")
        return self

    @property
    def share(self) -> float:
        """Its weight among those that answer."""
        return 0 if self.shadow else self.weight


class ServedModel(Section):
    """One artefact, or several versions of it, and the replicas that serve each."""

    name: str = Field(pattern=_NAME)  # the model's name in URLs
    artifact: str | None = None  # of version 1, if that is all, or
    versions: tuple[ServedVersion, ...] = ()
    replicas: int = Field(default=1, ge=1)  # of each version, as what follows
    autoscaling: Autoscaling | None = None  # in place of `replicas`
    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)  # of each replica; a fraction shares a GPU
    provider: Provider = "auto"
    gpu_mem_limit: int | None = Field(default=None, ge=1)  # bytes of CUDA's arena, where replicas share a GPU
    cuda_graphs: bool = False  # a classifier's, of provider cuda
    threads: int | None = Field(default=None, ge=1)  # cores that a replica uses; null is all that it may
    max_batch_size: int = Field(default=8, ge=1)  # on a CPU of images that take less than 5 ms; others run side by side
    max_ongoing_requests: int = Field(default=64, ge=1)  # at least the batch size, or batches never fill
    max_queued_requests: int = Field(default=256, ge=1)  # beyond these a client gets 503 at once
    timeout_s: float = Field(default=30, gt=0)
    max_surge_percent: int = Field(default=25, ge=0, le=100)  # replicas more, rounded up, while new ones replace old

    @model_validator(mode="after")
    def _versions_agree(self) -> Self:
        if (self.artifact is None) == (not self.versions):
            raise ValueError("give either artifact or versions")
        names = [version.version for version in self.versions]
        if len(set(names)) < len(names):
            raise ValueError(f"two versions have one name among {', '.join(names)}: give each its own")
        if self.versions and not any(version.share for version in self.versions):
            raise ValueError("no version has a weight above 0, so none would answer: give one of them a weight")
        return self

    @model_validator(mode="after")
    def _values_agree(self) -> Self:
        if self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests {self.max_ongoing_requests} is below max_batch_size {self.max_batch_size}, "
                "so batches would never fill; raise it"
            )
        if self.provider in ON_GPU and not self.num_gpus:
            raise ValueError(f"provider {self.provider} needs num_gpus above 0: Ray hides GPUs from replicas without")
        if self.provider not in ("auto", *ON_GPU) and self.num_gpus:
            raise ValueError(
                f"provider {self.provider} has no use for num_gpus={self.num_gpus}: ask for cuda, or for 0"
            )
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError("replicas and autoscaling exclude each other: leave one of them out")
        check_gpu_options(self.provider, self.gpu_mem_limit, self.cuda_graphs)
        return self

    @property
    def max_replicas(self) -> int:
        """Replicas of a version at the most."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def served(self) -> tuple[ServedVersion, ...]:
        """Its versions, the one with most weight first: its replicas own the model's path."""
        alone = () if self.artifact is None else (ServedVersion(version="1", artifact=self.artifact),)
        return tuple(sorted(self.versions or alone, key=lambda version: -version.share))

    def resolved(self) -> "ServedModel":
        """With absolute paths: Ray's processes run elsewhere."""
        here = {"artifact": self.artifact and str(Path(self.artifact).resolve())}
        versions = [v.model_copy(update={"artifact": str(Path(v.artifact).resolve())}) for v in self.versions]
        return self.model_copy(update={**here, "versions": tuple(versions)})


class ServingConfig(Section):
    """A run of `python -m serving run`."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)  # 0 picks a free one
    grpc_port: int | None = Field(default=None, ge=0, le=65535)  # of the protocol's gRPC service; null serves none
    max_body_bytes: int = Field(default=20_000_000, ge=1)
    start_timeout_s: float = Field(default=120, gt=0)  # to all models ready, warmed up
    api_keys: str | None = None  # a file of `name:key` lines; null asks nobody for a key
    access_log: str | None = None  # a file that each request adds a line of JSON to
    rate_limit: str | None = None  # of each key in each process: requests a second / at once, such as 10/20
    models: tuple[ServedModel, ...] = Field(min_length=1)

    @field_validator("models")
    @classmethod
    def _names_differ(cls, models: tuple[ServedModel, ...]) -> tuple[ServedModel, ...]:
        names = [model.name for model in models]
        if twice := repeated(names):
            raise ValueError(f"two models are named {twice!r}: give each its own name")
        # HAProxy knows the applications of further versions by these names.
        names += [f"{model.name}_{version.version}" for model in models for version in model.served[1:]]
        if twice := repeated(names):
            raise ValueError(f"HAProxy would know two models or versions as {twice!r}: rename one of them")
        return models

    @property
    def request_timeout_s(self) -> float:
        """Ray's own, for what waits to get to a replica, which answers 408 itself a second sooner."""
        return max(model.timeout_s for model in self.models) + 1

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.port and self.port == self.grpc_port:
            raise ValueError(f"port and grpc_port are both {self.port}: give each its own")
        return self

    @field_validator("rate_limit")
    @classmethod
    def _limit_is_one(cls, limit: str | None) -> str | None:
        if limit is not None:
            RateLimit.parse(limit)
        return limit

    @model_validator(mode="after")
    def _limits_have_keys(self) -> Self:
        if self.rate_limit is not None and self.api_keys is None:
            raise ValueError("rate_limit is one of each key: give api_keys as well, or leave it out")
        return self


def refuse_files(config: ServingConfig) -> None:
    """Refuse the files that a service's nodes, other machines, would not find here.

    Raises:
        InputError: it names one.
    """
    variables = {"api_keys": f"{KEYS_VARIABLE} and {LIMIT_VARIABLE}", "access_log": LOG_VARIABLE}
    for name, variable in variables.items():
        if getattr(config, name):
            raise InputError(f"{name} is a file here: on a cluster set {variable} on each node")
