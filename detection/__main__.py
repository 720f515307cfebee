"""python -m detection {train,eval}."""

import argparse
from collections.abc import Sequence

from backbones.cli import add_config_arguments, run_command


def _train(args: argparse.Namespace) -> None:
    from backbones.config import load_config
    from detection.config import DetectorConfig
    from detection.train import run_train

    result = run_train(load_config(DetectorConfig, args.config, args.overrides))
    best = result["best"]
    print(f"best AP50 {best['AP50']:.4f} at epoch {best['epoch']:.0f}: {result['weights']}")


def _eval(args: argparse.Namespace) -> None:
    from backbones.config import load_config
    from detection.config import DetectorConfig
    from detection.evaluate import run_eval, summary

    config = load_config(DetectorConfig, args.config, args.overrides)
    print(f"{config.model}, weights {config.weights}: {config.preprocess}")
    result = run_eval(config)
    print(f"{summary(result)}; {config.output}/eval.json, detections.json")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m detection", description="CSP networks under FPN detectors.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("train", _train, "train a detector on COCO-format data"),
        ("eval", _eval, "a checkpoint's AP, AP50, AP75 and the rest"),
    ):
        command = commands.add_parser(name, help=text)
        add_config_arguments(command)
        command.set_defaults(run=run)
    run_command(parser, argv)


if __name__ == "__main__":
    main()
