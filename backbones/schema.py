"""The base of every pydantic schema of the project; no torch here."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
