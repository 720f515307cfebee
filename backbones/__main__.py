"""python -m backbones {models,train,eval}."""

import argparse
import json
from collections.abc import Sequence

from backbones.cli import add_config_arguments, run_command


def _models(_: argparse.Namespace) -> None:
    from backbones.profile import table

    print(table())


def _train(args: argparse.Namespace) -> None:
    from backbones.config import ClassifierConfig, load_config
    from backbones.train import run_train

    result = run_train(load_config(ClassifierConfig, args.config, args.overrides))
    best = result["best"]
    print(f"best top-1 {100 * best['top1']:.2f} at epoch {best['epoch']:.0f}: {result['weights']}")


def _eval(args: argparse.Namespace) -> None:
    from backbones.config import ClassifierConfig, load_config
    from backbones.evaluate import run_eval, summary

    config = load_config(ClassifierConfig, args.config, args.overrides)
    print(f"{config.model}, weights {config.weights}: {config.preprocess}")
    result = run_eval(config)
    if args.per_class:
        print(json.dumps(result["per_class"], indent=2))
    print(f"{summary(result)}; {config.output}/eval.json")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m backbones", description="CSP networks as ImageNet classifiers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("models", help="list the networks, what they cost and their published accuracy")
    command.set_defaults(run=_models)
    command = commands.add_parser("train", help="train a classifier")
    add_config_arguments(command)
    command.set_defaults(run=_train)
    command = commands.add_parser("eval", help="top-1 and top-5 of a checkpoint")
    add_config_arguments(command)
    command.add_argument("--per-class", action="store_true", help="print each class's figures too")
    command.set_defaults(run=_eval)
    run_command(parser, argv)


if __name__ == "__main__":
    main()
