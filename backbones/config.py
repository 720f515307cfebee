"""Run configs: one flat YAML file a run, checked against a schema, overridable by dotted keys; no torch here."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from backbones.errors import InputError, unknown
from backbones.preprocess import ClassifierPreprocess, Decoder
from backbones.published import protocol
from backbones.schema import Device, OptimizerName, Section, Seed


class ImageData(Section):
    """Where the images and their classes are; `layouts.py` says how each layout is recognised."""

    root: str | None = None
    train_split: str = "train"
    split: str = "val"
    ground_truth: str | None = None  # for a flat folder of images
    label_ids: Literal["auto", "index", "ilsvrc2012"] = "auto"  # what integers in it mean
    real_labels: str | None = None  # ReaL's real.json, scored beside the original labels
    decoder: Decoder = "pillow"  # docs/backbones.md says what the others bring
    on_error: Literal["stop", "skip"] = "stop"  # at an image that cannot be decoded
    batch_size: int = Field(default=64, ge=1)
    workers: int = Field(default=2, ge=0)


class Recipe(Section):
    """How a network is optimised. `lr` is for `lr_batch` images a step, if that is given, and scaled to the batch that
    is used.
    """

    epochs: int = Field(default=90, ge=1)
    optimizer: OptimizerName = "sgd"
    lr: float = Field(default=0.1, gt=0)
    lr_batch: int | None = Field(default=None, ge=1)
    schedule: Literal["cosine", "poly", "step", "multistep"] = "cosine"  # after a linear warm-up; the first two to 0
    poly_power: float = Field(default=4.0, gt=0)
    decay_rate: float = Field(default=0.97, gt=0, le=1)  # of the steps: what the rate is multiplied by every
    decay_epochs: float = Field(default=2.4, gt=0)  # so many epochs, counted from the first (`step`), or
    milestones: tuple[float, ...] = ()  # after these epochs (`multistep`)
    warmup_epochs: float = Field(default=1.0, ge=0)  # of a single epoch, at most half
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True  # SGD's momentum
    weight_decay: float = Field(default=1e-4, ge=0)
    decay_norms: bool = False  # biases and normalisation too
    clip_grad_norm: float | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, ge=1)  # batches a step
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay of the averaged weights, which are then evaluated

    @field_validator("warmup_epochs")
    @classmethod
    def _shorter_than_the_run(cls, value: float, info: ValidationInfo) -> float:
        epochs = info.data.get("epochs", 1)
        if value >= epochs > 1:
            raise ValueError(f"the warm-up fills train.epochs={epochs}: shorten it, or train for longer")
        return value


class ClassifierTraining(Recipe):
    """A recipe, and what is done to the images."""

    drop_path: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)  # alpha of the Beta distribution; 0 is off
    cutmix: float = Field(default=0.0, ge=0)
    min_scale: float = Field(default=0.35, gt=0, le=1)  # smallest share of the area a random crop keeps
    horizontal_flip: float = Field(default=0.5, ge=0, le=1)
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float = Field(default=0.2, ge=0, le=1)
    randaugment: int = Field(default=0, ge=0, le=10)  # magnitude; 0 is off
    random_erasing: float = Field(default=0.0, ge=0, le=1)  # probability


class ClassifierConfig(Section):
    """A run of `python -m backbones {train,eval}`; what `preprocess` leaves out is the model's own protocol."""

    model: str
    num_classes: int = Field(default=1000, ge=1)
    weights: str | None = None  # a path, a URL, or `timm`; null leaves random weights
    ignore_head: bool = False  # leave out a head of another size when loading weights
    data: ImageData = ImageData()
    preprocess: ClassifierPreprocess
    train: ClassifierTraining = ClassifierTraining()
    seed: Seed = 0
    device: Device = "auto"
    amp: bool = False
    channels_last: bool = False
    sync_batchnorm: bool = False  # over the processes of torchrun
    resume: bool = False  # go on from the output folder's last.pt
    output: str = "runs/classifier"

    @model_validator(mode="before")
    @classmethod
    def _protocol(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("preprocess") or {}, dict):
            return values
        own = protocol(str(values.get("model"))).model_dump()
        return values | {"preprocess": own | (values.get("preprocess") or {})}


Schema = TypeVar("Schema", bound=BaseModel)


def load_config(schema: type[Schema], path: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """Read a YAML file, apply `a.b=value` overrides and check the result against `schema`.

    Raises:
        InputError: no such file, no YAML mapping, an override without `=`, or keys and values that
            the schema refuses; a misspelt key is named together with the nearest valid one.
    """
    values = read_values(path, overrides)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_explain(schema, detail) for detail in error.errors())
        raise InputError(f"{path}: {problems}") from None


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file's values with `a.b=value` overrides applied, unchecked."""
    values = _read_yaml(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"override {override!r} has no '='; write key=value, such as data.root=/data")
        _set(values, key.strip(), _parse(text, override))
    return values


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise InputError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping of keys to values")
    return values


def _parse(text: str, override: str) -> Any:
    """A number, a boolean, null, a list or `{...}` as YAML; anything else, such as a path, as it stands."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"the value of override {override!r} is not valid YAML; quote it") from None
    quoted = text[:1] in ("'", '"')
    if (isinstance(value, str) and not quoted) or (isinstance(value, dict) and not text.startswith("{")):
        return os.path.expanduser(text)
    return value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a number in it indexes a list."""
    *parents, last = key.split(".")
    node: Any = values
    for parent in parents:
        if isinstance(node, list):
            node = node[_index(node, parent, key)]
        else:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, dict | list):
            raise InputError(f"override {key!r}: {parent!r} is a plain value and has no keys below it")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _index(items: list[Any], text: str, key: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise InputError(f"override {key!r}: {text!r} is no index of a list of {len(items)}")
    return int(text)


def _explain(schema: type[BaseModel], detail: ErrorDetails) -> str:
    """One validation error in one line."""
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        fields = _fields_at(schema, detail["loc"][:-1])
        return str(unknown("key", where, (".".join([*where.split(".")[:-1], field]) for field in fields)))
    if detail["type"] == "missing":
        return f"{where} is missing: give it in the file or as {where}=…"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}={detail['input']!r}: {message}" if where else message


def _fields_at(schema: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The field names of the section at `loc`."""
    section: Any = schema
    for part in loc:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        args = [a for a in getattr(section, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        section = args[0] if args else section
    return list(section.model_fields)
