"""The work of `python -m backbones eval --models`: one evaluation a network, a row each in a CSV."""

import csv
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backbones.config import ClassifierConfig, load_config
from backbones.cspnet import get_variant
from backbones.distributed import everywhere, gather, is_main, on_main, world_size
from backbones.errors import InputError
from backbones.evaluate import find_weights, random_seed, run_eval
from backbones.files import check_writable, sha256, write_csv
from backbones.published import RELEASES
from backbones.summary import describe, headline, summary

# What makes two evaluations the same one; `seed` is that of random weights.
KEY = ("model", "weights_sha256", "ignore_head", "seed", "protocol", "data", "amp", "channels_last")
FIGURES = ("top1", "top5", "ece", "images", "skipped", "classes")
COST = ("images_per_second", "seconds", "batch_size", "device", "processes")
COLUMNS = (*KEY, "weights", *FIGURES, "real_top1", "published_by", "published_top1", "published_top5", *COST, "torch")
NOT_DATA = {"train_split", "batch_size", "workers"}  # the same images, whatever these say

Row = Mapping[str, str]


def configs_of(path: str | Path, overrides: Sequence[str], names: Sequence[str]) -> list[ClassifierConfig]:
    """A config a network: the file's and the overrides, but with the network's own protocol, where no override names
    `preprocess`, and an output folder of its own.

    Args:
        names: of networks, or `all` for every one that has published weights.

    Raises:
        InputError: an unknown name, or what `load_config` refuses.
    """
    names = list(RELEASES) if "all" in names else names
    configs = []
    for name in dict.fromkeys(get_variant(name)[0] for name in names):
        config = load_config(ClassifierConfig, path, ["preprocess=null", *overrides, f"model={name}"])
        configs.append(config.model_copy(update={"output": str(Path(config.output) / name)}))
    return configs


def run_models(
    configs: Sequence[ClassifierConfig], path: str | Path, device: torch.device | None = None
) -> dict[str, Exception]:
    """Evaluate what `path` has no row of yet, and add a row to it after each.

    Returns what went wrong, by network; the others are evaluated all the same. Under torchrun only a user's mistake is
    survived, which one process tells the others; and the main process's file says what is done.

    Raises:
        InputError: `path` cannot be written, or is a CSV file of something else.
    """
    path = Path(path)
    on_main(check_writable, path.parent)
    done = everywhere(lambda: {_key(row) for row in read_rows(path)} if is_main() else set())[0]
    problems: dict[str, Exception] = {}
    for config in configs:
        try:
            weights = find_weights(config)
            key = _key(_identity(config, sha256(weights) if weights else None))
            if gather(key in done)[0]:
                _say(f"{config.model}: already in {path}")
                continue
            _say(headline(config))
            result = run_eval(config, device)
            on_main(append_row, path, _row(config, result))
            _say(f"{summary(result)}; {config.output}")
        except InputError as error:
            problems[config.model] = error
        except Exception as error:
            if world_size() > 1:
                raise
            traceback.print_exc()
            problems[config.model] = error
    return problems


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run; none where there was no run.

    Raises:
        InputError: it cannot be read, or has other columns.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise InputError(f"{path} has other columns than this command writes: give another --csv")
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path} ({error}): give another --csv") from None


def append_row(path: Path, row: Row) -> None:
    """Add a row; the file has it wholly or not at all."""
    rows = [*read_rows(path), row]
    write_csv(path, COLUMNS, ([row[column] for column in COLUMNS] for row in rows))


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def _identity(config: ClassifierConfig, weights_sha256: str | None) -> Row:
    data = config.data.model_dump(exclude=NOT_DATA, exclude_none=True) | {"num_classes": config.num_classes}
    return {
        "model": config.model,
        "weights_sha256": weights_sha256 or "",
        "ignore_head": str(config.ignore_head),
        "seed": "" if (seed := random_seed(config)) is None else str(seed),
        "protocol": describe(config.preprocess),
        "data": json.dumps(data, sort_keys=True),
        "amp": str(config.amp),
        "channels_last": str(config.channels_last),
    }


def _row(config: ClassifierConfig, result: Mapping[str, Any]) -> Row:
    claim = (result["published"] or [{}])[0]
    row = dict(_identity(config, result["weights_sha256"]))
    row |= {column: str(result[column]) for column in (*FIGURES, *COST)} | {"weights": config.weights or ""}
    row["real_top1"] = str(result["real"]["top1"]) if result["real"] else ""
    row |= {f"published_{key}": str(claim.get(key, "")) for key in ("by", "top1", "top5")}
    return row | {"torch": result["versions"]["torch"]}


def _say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def report_problems(problems: Mapping[str, Exception]) -> None:
    """Say what went wrong, a line a network, and leave with 2 if it is all the user's mistakes, else with 1."""
    if not problems:
        return
    if is_main():
        for name, error in problems.items():
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            print(f"error: {name}: {kind}{error}", file=sys.stderr)
    raise SystemExit(2 if all(isinstance(error, InputError) for error in problems.values()) else 1)
