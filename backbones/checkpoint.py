"""Training state that resumes exactly, and the device and seeds of a run; both packages' training uses it."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from backbones.errors import InputError
from backbones.files import write_aside


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU, which is told to round denormal numbers to zero: detectors
    come to hold so many of them that a training step takes ten times as long.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
        torch.set_flush_denormal(True)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device={name} is not usable here ({reason}): give device=cpu or device=auto") from None


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _rng_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: dict[str, Any],
) -> None:
    """Everything that the next epoch depends on, written whole or not at all. `progress` is plain data."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": _rng_state(),
        "progress": progress,
    }
    with write_aside(path) as aside:
        torch.save(state, aside)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> dict[str, Any]:
    """Put everything back and return `progress`.

    Raises:
        InputError: no checkpoint there, or one of another run.
    """
    if not path.is_file():
        raise InputError(f"resume=true but there is no {path}: give the output folder of the run to go on with")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        _set_rng_state(state["rng"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is no checkpoint of this run ({reason}): give another output folder") from None
    progress: dict[str, Any] = state["progress"]
    return progress
