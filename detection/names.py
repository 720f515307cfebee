"""What detectors are called; no torch here."""

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from backbones import published

Family = Literal["fasterrcnn", "retinanet", "fcos", "maskrcnn"]
Neck = Literal["fpn", "efm"]

FAMILY_NAMES: tuple[Family, ...] = get_args(Family)
NECKS: tuple[Neck, ...] = get_args(Neck)


@dataclass(frozen=True)
class Name:
    """A detector's name in its parts; `backbone` is the table's, no alias."""

    family: str
    backbone: str
    neck: Neck
    second: bool

    def __str__(self) -> str:
        return f"{self.family}_{self.backbone}_{self.neck}" + "_v2" * self.second


def split(name: str) -> Name | None:
    """A detector's name in its parts, its backbone's alias resolved; None if it has no such parts.

    Whether there is such a backbone, and such a version, is left to `spec.parse`.
    """
    match = re.fullmatch(rf"({'|'.join(FAMILY_NAMES)})_(.+)_({'|'.join(NECKS)})(_v2)?", name)
    if match is None:
        return None
    return Name(match[1], published.without_alias(match[2]), cast(Neck, match[3]), match[4] is not None)


def is_detector(name: str) -> bool:
    """Whether a name is a detector's and not a classifier's; it may still be unknown."""
    return name.partition("_")[0] in FAMILY_NAMES


def without_alias(name: str) -> str:
    """A detector's or a network's name with the network's own for an alias; an unknown one stays as it is."""
    detector = split(name)
    return published.without_alias(name) if detector is None else str(detector)
