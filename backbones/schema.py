"""The base of every pydantic schema of the project; no torch here."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

OptimizerName = Literal["sgd", "adamw"]


class Section(BaseModel):
    """Frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
