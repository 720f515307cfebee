"""The config of a batch job; no torch here."""

import os
from pathlib import PurePath
from typing import Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from backbones.schema import Section, repeated
from serving.sessions.providers import ON_GPU, Provider

RESULT_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


class BatchModel(Section):
    """One artefact that every image goes through."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # its folder of parts, below `output`
    artifact: str
    provider: Provider = "auto"  # cuda where an actor has a share of a GPU, else cpu
    results: str | None = None  # one file besides: COCO's results as .json, or .jsonl, .csv, .parquet

    @field_validator("results")
    @classmethod
    def _is_written_here(cls, results: str | None) -> str | None:
        if results is not None and PurePath(results).suffix not in RESULT_SUFFIXES:
            raise ValueError(f"no such format: end it in one of {', '.join(RESULT_SUFFIXES)}")
        return results


class Actors(Section):
    """The pool of processes that run the models, each all of them. It grows and shrinks with the load."""

    min_actors: int = Field(default=1, ge=1)
    max_actors: int | None = Field(default=None, ge=1)  # null is min_actors
    num_cpus: float | None = Field(default=None, ge=0)  # of each; null is a share, with tasks 0, of GPUs 1
    num_gpus: float = Field(default=0, ge=0)  # of each; a fraction shares a GPU
    threads: int | None = Field(default=None, ge=1)  # of each; null is one a core, shared by a node's actors

    @property
    def most(self) -> int:
        """Actors at the most."""
        return self.max_actors or self.min_actors

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.most < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} is below min_actors {self.min_actors}: swap or equal them")
        return self


class BatchConfig(Section):
    """A run of `python -m serving batch`; `inputs.py` says what `input` may be."""

    input: str
    images: str | None = None  # the folder of a COCO file's or a manifest's names; null is that file's own
    labels: Literal["folder"] | None = None  # score classifiers by the top folder of each name
    output: str  # a folder
    part_rows: int = Field(default=512, ge=1)  # of each Parquet part; what a job that is killed loses at the most
    batch_size: int = Field(default=8, ge=1)  # on a GPU or in OpenVINO; onnxruntime's CPU runs images side by side
    decode: Literal["actors", "tasks"] = "actors"  # in threads of the actors, or on CPUs of any node
    on_error: Literal["row", "fail"] = "row"  # an image that cannot be read: a row that says so, or the job's end
    max_error_share: float = Field(default=0.5, ge=0, le=1)  # above it, of 100 images or more, the job ends
    annotated: bool = False  # keep each image with its result drawn on it
    actors: Actors = Actors()
    models: tuple[BatchModel, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _values_agree(self) -> Self:
        if twice := repeated([model.name for model in self.models]):
            raise ValueError(f"two models are named {twice!r}: give each its own name")
        results = [os.path.realpath(model.results) for model in self.models if model.results is not None]
        if twice := repeated([*results, os.path.realpath(self.input)]):
            raise ValueError(f"results would replace another model's, or the input: {twice}: name another file")
        for model in self.models:
            if model.provider != "auto" and (model.provider in ON_GPU) != (self.actors.num_gpus > 0):
                raise ValueError(
                    f"provider {model.provider} does not go with num_gpus={self.actors.num_gpus:g}: cuda and tensorrt "
                    "need a share of a GPU, and no other has a use for it"
                )
        return self

    def provider(self, model: BatchModel) -> Provider:
        """The provider that `auto` stands for."""
        if model.provider != "auto":
            return model.provider
        return "cuda" if self.actors.num_gpus else "cpu"
