"""A training run's device, seeds and folder, from which it resumes exactly; both packages' training uses it."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from backbones.distributed import grouped, is_main, local_rank, on_main, world_size
from backbones.errors import InputError
from backbones.files import check_writable, remove_leftovers, write_aside, write_csv, write_json
from backbones.weights import save_weights

# What a run writes, but TensorBoard's log and a detector's diverged batches.
FILES = ("best.safetensors", "last.safetensors", "history.json", "history.csv", "last.pt")
# What may differ between a run and its resumption.
PLACES = {"root", "ground_truth", "real_labels", "train_images", "train_annotations", "images", "annotations"}
STARTS = {"weights", "weights_backbone"}  # that a resumed run has behind it
ANY_TIME: Any = dict.fromkeys({"resume", "output", "device", "metric"} | STARTS, True) | {"data": {"workers"} | PLACES}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU, which is told to round denormal numbers to zero: detectors
    come to hold so many of them that a training step takes ten times as long.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda" and grouped():  # each process on its own card
            name = f"cuda:{local_rank()}"
        torch.empty(1, device=name)
        torch.set_flush_denormal(True)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device={name} is not usable here ({reason}): give device=cpu or device=auto") from None


def device_name(device: torch.device) -> str:
    """A GPU's own, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def find_checkpoint(config: Any) -> Path:
    """The `last.pt` that a config's run goes on from.

    Raises:
        InputError: there is none.
    """
    path = Path(config.output) / "last.pt"
    if not path.is_file():
        raise InputError(f"resume=true but there is no {path}: give the output folder of the run to go on with")
    return path


class Run:
    """One training run's folder: `last.pt` to resume from, `{best,last}.safetensors`, `history.{json,csv}`.

    A checkpoint holds no state of random generators: seed them anew each epoch, from the run's seed and the epoch.
    Under torchrun every process has a `Run`; the main one writes. Another run's files that are in the folder go to
    `previous-<n>/` in it when the first `Run` that does not resume is made.

    Attributes:
        history: an entry an epoch, `{"epoch": 1, "loss": ..., <metric>: ...}`.

    Args:
        config: the run's; its `resume` says whether to go on from `last.pt`, its `output` where that is.
        metric: the key of `history` whose first largest value is the best epoch's.
        metadata: of the weights that are saved.
        ema: averaged weights of `model`, saved in its place.
        facts: what else has to be the same for a resumed run to end as an undisturbed one, such as its images.

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
        *,
        ema: AveragedModel | None = None,
        facts: dict[str, Any] | None = None,
    ):
        self.output, self.metric, self.metadata = Path(config.output), metric, metadata
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
        if ema is not None:
            self.parts["ema"] = ema
        self.weights: nn.Module = model if ema is None else ema.module
        here = {"device": next(model.parameters()).device.type, "processes": world_size()}
        self.settings = _flat(config.model_dump(mode="json", exclude=ANY_TIME)) | here | (facts or {})
        self.history: list[dict[str, float]] = []
        on_main(_clear, self.output, config.resume)
        if config.resume:
            self._load(find_checkpoint(config))

    def finish_epoch(self, entry: dict[str, float]) -> None:
        """Keep an epoch: its figures, all that the next one depends on, and the weights, also as the best if they are.

        Until `last.pt` is there, the epoch is not finished, and a resumed run repeats it. The best weights follow it:
        repeated on CUDA, an epoch ends with others, and those of its first time would be in no history.
        """
        self.history.append({"epoch": len(self.history) + 1, **entry})
        if not is_main():
            return
        save_weights(self.output / "last.safetensors", self.weights, self.metadata)
        write_json(self.output / "history.json", self.history)
        names = list(self.history[0])
        write_csv(self.output / "history.csv", names, ([row[name] for name in names] for row in self.history))
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with write_aside(self.output / "last.pt") as aside:
            torch.save(state | {"history": self.history, "settings": self.settings}, aside)
        self._save_best()

    def _save_best(self) -> None:
        """If the last epoch is the first to be so good."""
        if max(self.history, key=lambda entry: entry[self.metric]) is self.history[-1]:
            save_weights(self.output / "best.safetensors", self.weights, self.metadata)

    def result(self) -> dict[str, Any]:
        """The best epoch's figures, the history, and where the best weights are."""
        best = max(self.history, key=lambda entry: entry[self.metric])
        return {"best": best, "history": self.history, "weights": str(self.output / "best.safetensors")}

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as error:  # torch raises half a dozen kinds here
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path} is no checkpoint of a run ({reason}): give another output folder") from None
        if settings.get("data.on_error") == "stop" and self.settings.get("data.on_error") == "skip":
            settings["data.on_error"] = "skip"  # to skip changes nothing of epochs that met no broken image
        differing = [key for key in {**settings, **self.settings} if settings.get(key) != self.settings.get(key)]
        if differing:
            key = differing[0]
            raise InputError(
                f"{path} is of a run with {key}={settings.get(key)}, not {self.settings.get(key)}: give the same"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.history = state["history"]
        if is_main():
            self._save_best()  # whoever killed the run may have been faster


def _clear(output: Path, resume: bool) -> None:
    """Make the folder ready: remove what a killed run was writing, move what another run finished out of the way."""
    check_writable(output)
    for name in FILES:
        remove_leftovers(output / name)
    diverged = sorted(path.name for path in output.glob("diverged*"))
    there = [name for name in ("tensorboard", *diverged, *FILES) if (output / name).exists()]
    if resume or not there:
        return
    numbers = itertools.count(1)
    place = next(place for place in (output / f"previous-{number}" for number in numbers) if not place.exists())
    place.mkdir()
    for name in there:
        (output / name).rename(place / name)
    print(f"{output} held another run without resume=true: its files are now in {place}", flush=True)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections under dotted keys, as they are written on the command line."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
