"""Configs of batch jobs."""

from pathlib import Path
from typing import Any

from serving.jobs.config import BatchConfig


def job(model: Path | dict[str, Path], source: object, output: object, **values: Any) -> BatchConfig:
    """A job of one model, `m`, or of several by name."""
    paths = model if isinstance(model, dict) else {"m": model}
    models = [{"name": name, "artifact": str(path)} for name, path in paths.items()]
    return BatchConfig.model_validate({"input": str(source), "output": str(output), "models": models} | values)
