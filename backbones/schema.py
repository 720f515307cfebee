"""The base of every pydantic schema of the project, and what they share; no torch here."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

OptimizerName = Literal["sgd", "adamw", "lamb", "rmsprop"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")]  # as torch names them, or auto


def repeated(names: Sequence[str]) -> str | None:
    """One that is there twice."""
    return next((name for name in names if names.count(name) > 1), None)


class Section(BaseModel):
    """Frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)
