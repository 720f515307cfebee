"""What the three packages' command lines share; no torch here."""

import argparse
from collections.abc import Sequence

from backbones.errors import exit_on_input_error


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and its dotted overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as those of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over the file's, such as data.root=…")


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Parse and call the chosen command's `run`; overrides may stand before or after options."""
    args, rest = parser.parse_known_args(argv)
    foreign = [word for word in rest if word.startswith("-") or "=" not in word]
    if foreign or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(foreign or rest)}")
    if rest:
        args.overrides += rest
    with exit_on_input_error():
        args.run(args)
