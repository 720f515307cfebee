"""python -m backbones {models,profile,train,eval}."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from backbones.cli import add_config_arguments, at_least, run_command
from backbones.errors import InputError


def _models(_: argparse.Namespace) -> None:
    from backbones.profile import table

    print(table())


def _profile(args: argparse.Namespace) -> None:
    from backbones.checkpoint import pick_device
    from backbones.files import check_writable, write_json
    from backbones.profile import compare, render
    from backbones.published import PAPER

    if bool(args.models) == args.paper:
        raise InputError("give either names of `python -m backbones models`, or --paper")
    models = list(PAPER) if args.paper else args.models
    if args.json:
        check_writable(Path(args.json).parent)
    rows = compare(
        models, args.size, pick_device(args.device), batch_size=args.batch_size, training_batch=args.training_batch,
        runs=args.runs,
    )  # fmt: skip
    print(render(rows))
    if args.json:
        write_json(args.json, rows)
    if args.paper:
        print("docs/backbones.md says how the paper counted, and which of its networks are reconstructed here")


def _train(args: argparse.Namespace) -> None:
    from backbones.config import ClassifierConfig, load_config
    from backbones.train import run_train

    run_train(load_config(ClassifierConfig, args.config, args.overrides))


def _eval(args: argparse.Namespace) -> None:
    from backbones.checkpoint import pick_device
    from backbones.config import ClassifierConfig, load_config
    from backbones.distributed import is_main, process_group
    from backbones.evaluate import run_eval
    from backbones.summary import headline, summary

    if bool(args.models) != bool(args.csv):
        raise InputError("--models and --csv go together: give the networks' names and the file for their figures")
    if args.models and args.per_class:
        raise InputError("--per-class is of one network: with --models it is in each folder's per_class.csv")
    if args.models:
        _eval_models(args)
        return
    config = load_config(ClassifierConfig, args.config, args.overrides)
    with process_group(pick_device(config.device)) as device:
        if is_main():
            print(headline(config), flush=True)
        result = run_eval(config, device)
        if is_main():
            if args.per_class:
                print(json.dumps(result["per_class"], indent=2))
            print(f"{summary(result)}; {config.output}/eval.json")


def _eval_models(args: argparse.Namespace) -> None:
    from backbones.checkpoint import pick_device
    from backbones.compare import configs_of, report_problems, run_models
    from backbones.distributed import process_group

    # Overrides may follow the names, which argparse cannot tell apart.
    names = [word for word in args.models if "=" not in word]
    configs = configs_of(args.config, args.overrides + [word for word in args.models if "=" in word], names)
    if not configs:
        raise InputError("--models names no network: give names of `python -m backbones models`, or all")
    with process_group(pick_device(configs[0].device)) as device:
        report_problems(run_models(configs, args.csv, device))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m backbones", description="CSP networks as ImageNet classifiers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("models", help="list the networks, what they cost and their published accuracy")
    command.set_defaults(run=_models)
    command = commands.add_parser("profile", help="what networks cost, each beside its plain twin")
    command.add_argument("models", nargs="*", metavar="NAME", help="networks of `models`")
    command.add_argument("--paper", action="store_true", help="the paper's own networks, with its figures beside")
    command.add_argument("--size", type=at_least(32), help="pixels of a side (default: 256, or the paper's)")
    command.add_argument("--batch-size", type=at_least(1), default=1, help="images of a timed pass (default: 1)")
    command.add_argument(
        "--training-batch", type=at_least(1), default=32, help="images of a step whose memory is counted (default: 32)"
    )
    command.add_argument("--runs", type=at_least(0), default=10, help="timed passes, of which the median; 0 for none")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    command.add_argument("--json", metavar="FILE", help="write the rows as JSON too")
    command.set_defaults(run=_profile)
    command = commands.add_parser("train", help="train a classifier")
    add_config_arguments(command)
    command.set_defaults(run=_train)
    command = commands.add_parser("eval", help="top-1, top-5 and a report of a checkpoint, or of many in a CSV")
    add_config_arguments(command)
    command.add_argument("--models", nargs="+", metavar="NAME", help="networks in the config's place; all: published")
    command.add_argument("--csv", metavar="FILE", help="a row for each of --models; those it has are not run again")
    command.add_argument("--per-class", action="store_true", help="print each class's figures too")
    command.set_defaults(run=_eval)
    run_command(parser, argv)


if __name__ == "__main__":
    main()
