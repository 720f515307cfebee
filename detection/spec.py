"""What a detector is called and what it takes to build it."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from pydantic import Field

from backbones.cspnet import get_variant
from backbones.distributed import world_size
from backbones.errors import InputError
from backbones.published import ALIASES, PLAIN
from backbones.schema import Section
from backbones.variants import VARIANTS
from detection.config import DetectorConfig, Level, Norm
from detection.families import FAMILIES
from detection.necks import NECKS, ExtraLevels, Neck
from detection.published import RESNET50

FrozenStages = Literal["none", "stem", "c2", "c3", "c4", "c5"]


@dataclass(frozen=True)
class Name:
    """A detector's name in its parts; `backbone` is the table's, no alias."""

    family: str
    backbone: str
    neck: Neck
    second: bool

    def __str__(self) -> str:
        return f"{self.family}_{self.backbone}_{self.neck}" + "_v2" * self.second


def parse(name: str) -> Name:
    """A detector's name in its parts, its backbone's alias resolved.

    Raises:
        InputError: unknown name, and the nearest one.
    """
    match = re.fullmatch(rf"([a-z]+)_(.+)_({'|'.join(NECKS)})(_v2)?", name)
    if match is None or match[1] not in FAMILIES or (2 if match[4] else 1) not in FAMILIES[match[1]].versions:
        raise _unknown(name)
    backbone = match[2]
    if backbone != RESNET50:
        if backbone.removesuffix(PLAIN) not in {**VARIANTS, **ALIASES}:
            raise _unknown(name)
        backbone = get_variant(backbone)[0]
    return Name(match[1], backbone, cast(Neck, match[3]), match[4] is not None)


def _unknown(name: str) -> InputError:
    near = difflib.get_close_matches(name, list(names([*VARIANTS, *ALIASES, RESNET50])), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`python -m detection models` lists them"
    return InputError(f"unknown detector {name!r}: {hint}")


def names(backbones: Iterable[str]) -> Iterator[str]:
    """Every detector over each of these backbones."""
    for backbone in backbones:
        for neck in NECKS:
            for family, row in FAMILIES.items():
                yield from (str(Name(family, backbone, cast(Neck, neck), version == 2)) for version in row.versions)


def canonical_name(name: str) -> str:
    """A detector's name with its backbone's alias resolved.

    Raises:
        InputError: unknown name.
    """
    return str(parse(name))


class DetectorSpec(Section):
    """All that it takes to build a detector; kept in its weights' metadata. None means torchvision's default."""

    model: str
    num_classes: int = Field(ge=2)  # background included, as torchvision counts
    fpn_channels: int = Field(default=256, ge=64, multiple_of=32)  # the heads' GroupNorm has 32 groups
    norm: Norm = "batch"
    frozen_stages: FrozenStages = "none"
    levels: tuple[Level, ...] | None = None
    extra_levels: ExtraLevels | None = None
    score_threshold: float | None = Field(default=None, ge=0, lt=1)
    nms_iou: float | None = Field(default=None, gt=0, le=1)
    max_detections: int | None = Field(default=None, ge=1)

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
    return DetectorSpec(
        model=canonical_name(config.model), num_classes=num_classes, fpn_channels=config.fpn_channels,
        norm=resolve_norm(config.norm, pretrained, cuda),
        frozen_stages=resolve_frozen(config.frozen_stages, pretrained), levels=config.levels,
        extra_levels=config.extra_levels, score_threshold=config.score_threshold, nms_iou=config.nms_iou,
        max_detections=config.max_detections,
    )  # fmt: skip


def resolve_norm(norm: Norm | None, pretrained: bool, cuda: bool) -> Norm:
    """The backbone's norm where None stands for the usual one.

    Raises:
        InputError: frozen random weights.
    """
    if norm == "frozen" and not pretrained:
        raise InputError(
            "norm=frozen freezes random weights: give weights_backbone or weights, or norm=batch, sync or group"
        )
    if norm is None:
        return "frozen" if pretrained else "sync" if cuda and world_size() > 1 else "batch"
    return norm


def resolve_frozen(stages: FrozenStages | None, pretrained: bool) -> FrozenStages:
    """The stages to freeze where None stands for the usual ones.

    Raises:
        InputError: frozen random weights.
    """
    if stages not in (None, "none") and not pretrained:
        raise InputError(
            f"frozen_stages={stages} freezes random weights: give weights_backbone or weights, or frozen_stages=none"
        )
    return stages or ("c2" if pretrained else "none")
