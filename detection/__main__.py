"""python -m detection {models,train,eval,score,check-data}."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backbones.cli import add_config_arguments, at_least, run_command
from backbones.errors import InputError

if TYPE_CHECKING:
    from detection.coco_eval import Metric


def _models(args: argparse.Namespace) -> None:
    from backbones.variants import VARIANTS
    from detection.profile import table
    from detection.published import RESNET50
    from detection.spec import names

    if args.all and args.models:
        raise InputError("give either names of detectors, or --all")
    for line in table(list(names([*VARIANTS, RESNET50])) if args.all else args.models):
        print(line, flush=True)


def _train(args: argparse.Namespace) -> None:
    from backbones.config import load_config
    from detection.config import DetectorConfig
    from detection.train import run_train

    run_train(load_config(DetectorConfig, args.config, args.overrides))


def _eval(args: argparse.Namespace) -> None:
    from backbones.checkpoint import pick_device
    from backbones.config import load_config
    from backbones.distributed import is_main, process_group
    from detection.config import DetectorConfig
    from detection.evaluate import run_eval
    from detection.summary import headline, summary

    config = load_config(DetectorConfig, args.config, args.overrides)
    if args.detections:
        if config.data.annotations is None:
            raise InputError("--detections needs the truth: set data.annotations")
        _print_score(args.detections, config.data.annotations, config.data.images, config.output, config.metric)
        return
    with process_group(pick_device(config.device)) as device:
        if is_main():
            print(headline(config), flush=True)
        result = run_eval(config, device)
        if is_main():
            print(f"{summary(result)}; {config.output}/eval.json, detections.json, report/report.html")


def _score(args: argparse.Namespace) -> None:
    _print_score(args.detections, args.annotations, args.images, args.output, args.metric)


def _print_score(detections: str, annotations: str, images: str | None, output: str, metric: "Metric") -> None:
    from backbones.distributed import check_alone
    from detection.evaluate import score_results
    from detection.summary import summary

    check_alone("scoring a results file")
    result = score_results(detections, annotations, images, output, metric)
    print(f"{summary(result)}; {output}/eval.json, report/report.html")


def _check_data(args: argparse.Namespace) -> None:
    from detection.data_report import run_check

    result = run_check(
        args.annotations, args.images, args.output, args.json, whole=args.decode, seed=args.seed, tiles=args.tiles
    )
    raise SystemExit(1 if result["errors"] else 0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m detection", description="CSP networks under FPN detectors.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser(
        "models", help="list detectors, what they cost and what torchvision published of them"
    )
    listing.add_argument("models", nargs="*", metavar="NAME", help="these detectors (default: over four backbones)")
    listing.add_argument("--all", action="store_true", help="over every backbone, with either neck")
    listing.set_defaults(run=_models)
    command = commands.add_parser("train", help="train a detector on COCO-format data")
    add_config_arguments(command)
    command.set_defaults(run=_train)
    command = commands.add_parser("eval", help="COCO's figures of a checkpoint, and a report of what they are made of")
    add_config_arguments(command)
    command.add_argument("--detections", metavar="FILE", help="score this file in COCO's results format, not a model")
    command.set_defaults(run=_eval)
    scoring = commands.add_parser("score", help="the same of a file of detections alone, without a CONFIG")
    scoring.add_argument("--detections", required=True, metavar="FILE", help="in COCO's results format")
    scoring.add_argument("--annotations", required=True, metavar="FILE")
    scoring.add_argument("--images", metavar="DIR", help="where the images are, to draw the worst of them")
    scoring.add_argument("--output", metavar="DIR", default="runs/detections", help="for eval.json and report/")
    scoring.add_argument("--metric", choices=("pycocotools", "fast"), default="pycocotools")
    scoring.set_defaults(run=_score)
    checking = commands.add_parser("check-data", help="name every defect of a COCO-format data set, and draw it")
    checking.add_argument("--annotations", required=True, metavar="FILE")
    checking.add_argument("--images", metavar="DIR", help="check the image files too, by their headers")
    checking.add_argument("--decode", action="store_true", help="decode the images whole, which finds cut-off ones")
    checking.add_argument("--output", metavar="DIR", help="write findings.json, findings.csv and contact_sheet.png")
    checking.add_argument("--json", metavar="FILE", help="write findings and figures there")
    checking.add_argument("--tiles", type=at_least(1), default=24, help="images on the contact sheet (default: 24)")
    checking.add_argument("--seed", type=at_least(0), default=0, help="of those drawn beside the images with findings")
    checking.set_defaults(run=_check_data)
    run_command(parser, argv)


if __name__ == "__main__":
    main()
