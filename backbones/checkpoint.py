"""A training run's device, seeds and folder, from which it resumes exactly; both packages' training uses it."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from backbones.errors import InputError
from backbones.files import check_writable, write_aside, write_json
from backbones.weights import save_weights

# What may differ between a run and its resumption.
PLACES = {"root", "ground_truth", "train_images", "train_annotations", "images", "annotations"}
ANY_TIME: Any = {"resume": True, "output": True, "device": True, "data": {"workers"} | PLACES}


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


class Run:
    """One training run's folder: `last.pt` to resume from, `best.safetensors`, `history.json`.

    Attributes:
        history: an entry an epoch, `{"epoch": 1, "loss": ..., <metric>: ...}`.

    Args:
        config: the run's; its `resume` says whether to go on from `last.pt`, its `output` where that is.
        metric: the key of `history` whose first largest value is the best epoch's.
        metadata: of the weights that are saved.

    Raises:
        InputError: the folder cannot be written, there is nothing to resume from, or it is another run's.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        metric: str,
        metadata: dict[str, Any],
    ):
        self.output, self.metric, self.metadata = Path(config.output), metric, metadata
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.settings = config.model_dump(mode="json", exclude=ANY_TIME)
        self.history: list[dict[str, float]] = []
        check_writable(self.output)
        if config.resume:
            self._load(self.output / "last.pt")

    def finish_epoch(self, entry: dict[str, float]) -> None:
        """Keep an epoch: its figures, all that the next one depends on, and the weights if they are the best."""
        best = max((earlier[self.metric] for earlier in self.history), default=-math.inf)
        self.history.append({"epoch": len(self.history) + 1, **entry})
        if entry[self.metric] > best:
            save_weights(self.output / "best.safetensors", self.model, self.metadata)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": _rng_state(),
            "history": self.history,
            "settings": self.settings,
        }
        with write_aside(self.output / "last.pt") as aside:
            torch.save(state, aside)
        write_json(self.output / "history.json", self.history)

    def result(self) -> dict[str, Any]:
        """The best epoch's figures, the history, and where the best weights are."""
        best = max(self.history, key=lambda entry: entry[self.metric])
        return {"best": best, "history": self.history, "weights": str(self.output / "best.safetensors")}

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"resume=true but there is no {path}: give the output folder of the run to go on with")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as error:  # torch raises half a dozen kinds here
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path} is no checkpoint of a run ({reason}): give another output folder") from None
        differing = [key for key in settings if settings[key] != self.settings.get(key)]
        if differing:
            key = differing[0]
            raise InputError(
                f"{path} is of a run with {key}={settings[key]}, not {self.settings.get(key)}: give the same config"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        _set_rng_state(state["rng"])
        self.history = state["history"]
