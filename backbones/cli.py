"""What the three packages' command lines share; no torch here."""

import argparse
import os
from collections.abc import Callable, Sequence

from backbones.errors import exit_on_input_error

# How often an OpenMP thread of PyTorch's asks for the others before it sleeps. By GNU's default, 300 000 times, they
# hold each other up at every operator beside another busy process: ResNet-50 took 1.5 s an image on two cores, and with
# this 0.16; 0.056 s either way with nothing beside it.
SPINS = "10000"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and its dotted overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as those of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over the file's, such as data.root=…")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return parse


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Parse and call the chosen command's `run`; overrides may stand before or after options."""
    args, rest = parser.parse_known_args(argv)
    foreign = [word for word in rest if word.startswith("-") or "=" not in word]
    if foreign or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(foreign or rest)}")
    if rest:
        args.overrides += rest
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # which is read as the command imports PyTorch
    with exit_on_input_error():
        args.run(args)
