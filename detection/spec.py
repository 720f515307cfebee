"""What it takes to build a detector, by its name."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from pydantic import Field, ValidationError

from backbones.cspnet import get_variant
from backbones.distributed import world_size
from backbones.errors import InputError
from backbones.published import ALIASES, PLAIN
from backbones.schema import Section
from backbones.variants import VARIANTS
from detection.config import DetectorConfig, DetectorSettings, FrozenStages, Norm
from detection.families import FAMILIES
from detection.names import NECKS, Name, split
from detection.published import RESNET50


def parse(name: str) -> Name:
    """A detector's name in its parts, its backbone's alias resolved.

    Raises:
        InputError: unknown name, and the nearest one.
    """
    found = split(name)
    if found is None or (2 if found.second else 1) not in FAMILIES[found.family].versions:
        raise _unknown(name)
    if found.backbone != RESNET50:
        if found.backbone.removesuffix(PLAIN) not in VARIANTS:
            raise _unknown(name)
        get_variant(found.backbone)  # which refuses the plain twin of a plain network
    return found


def _unknown(name: str) -> InputError:
    near = difflib.get_close_matches(name, list(names([*VARIANTS, *ALIASES, RESNET50])), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`python -m detection models` lists them"
    return InputError(f"unknown detector {name!r}: {hint}")


def names(backbones: Iterable[str]) -> Iterator[str]:
    """Every detector over each of these backbones."""
    for backbone in backbones:
        for neck in NECKS:
            for family, row in FAMILIES.items():
                yield from (str(Name(family, backbone, neck, version == 2)) for version in row.versions)


def canonical_name(name: str) -> str:
    """A detector's name with its backbone's alias resolved.

    Raises:
        InputError: unknown name.
    """
    return str(parse(name))


class DetectorSpec(DetectorSettings):
    """All that it takes to build a detector; kept in its weights' metadata."""

    num_classes: int = Field(ge=2)  # background included, as torchvision counts
    norm: Norm = "batch"
    frozen_stages: FrozenStages = "none"

    @property
    def neck_levels(self) -> tuple[str, ...]:
        """The backbone's maps that the neck takes."""
        return FAMILIES[parse(self.model).family].levels if self.levels is None else self.levels


def spec_of(config: DetectorConfig, num_classes: int) -> DetectorSpec:
    """The detector that a config describes, with `num_classes` counting the background.

    Raises:
        InputError: unknown name, or frozen random weights.
    """
    pretrained = config.weights_backbone is not None or config.weights is not None
    cuda = config.device.startswith(("auto", "cuda")) and torch.cuda.is_available()
    return resolve(config, num_classes, pretrained, sync=cuda and world_size() > 1)


def resolve(settings: DetectorSettings, num_classes: int, pretrained: bool, sync: bool) -> DetectorSpec:
    """Settings with the usual norm and frozen stages where None stands for them.

    Args:
        sync: whether several processes would train on CUDA.

    Raises:
        InputError: unknown name, or frozen random weights.
    """
    norm, frozen = settings.norm, settings.frozen_stages
    if norm == "frozen" and not pretrained:
        raise InputError(
            "norm=frozen freezes random weights: give weights_backbone or weights, or norm=batch, sync or group"
        )
    if frozen not in (None, "none") and not pretrained:
        raise InputError(
            f"frozen_stages={frozen} freezes random weights: give weights_backbone or weights, or frozen_stages=none"
        )
    decided = {
        "model": canonical_name(settings.model), "num_classes": num_classes,
        "norm": norm or ("frozen" if pretrained else "sync" if sync else "batch"),
        "frozen_stages": frozen or ("c2" if pretrained else "none"),
    }  # fmt: skip
    given = settings.model_dump(include=set(DetectorSettings.model_fields))
    return checked(DetectorSpec, given | decided, settings.model)


Schema = TypeVar("Schema", bound=Section)


def checked(schema: type[Schema], values: Mapping[str, Any], whose: object) -> Schema:
    """Values as a schema.

    Raises:
        InputError: the first that does not fit, and whose it is.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = "".join(f"{part}: " for part in problem["loc"])
        raise InputError(f"{whose}: {where}{problem['msg'].removeprefix('Value error, ')}") from None
