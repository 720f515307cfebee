"""python -m serving {export,inspect,quantize,run,deploy-config,batch,eval,prove,quickstart}."""

import argparse
import json
from collections.abc import Sequence

from backbones.cli import add_config_arguments, at_least, run_command
from serving.sessions.providers import PROVIDERS


def _export(args: argparse.Namespace) -> None:
    from serving.export import run_export

    artifact = run_export(
        args.weights, args.output, model=args.model, images=args.images, precision=args.precision, nms=args.nms,
        score_threshold=args.score_threshold, nms_iou=args.nms_iou, max_detections=args.max_detections,
    )  # fmt: skip
    parity = artifact.parity
    differences = ", ".join(f"{name} {value:.2g}" for name, value in parity.largest.items())
    matched = f" with {parity.detections} detections of both" if artifact.task == "detection" else ""
    print(f"{args.output}: {artifact.model}, {len(artifact.classes)} classes, {artifact.preprocess}")
    print(f"largest difference from PyTorch on {parity.images} pictures{matched}: {differences}")
    if artifact.task == "detection" and not parity.detections:
        print("no detection was compared: export with --images FOLDER of pictures that show objects")


def _inspect(args: argparse.Namespace) -> None:
    from serving.describe import describe, summary

    description = describe(args.file)
    lines = [json.dumps(description, indent=2)] if args.json else summary(description)
    print("\n".join(lines))


def _quantize(args: argparse.Namespace) -> None:
    from serving.quantize import run_quantize

    artifact = run_quantize(
        args.model, args.output, args.config, args.overrides, calibration=args.calibration, images=args.images,
        method=args.method, max_drop=args.max_drop, force=args.force,
    )  # fmt: skip
    about = artifact.quantization
    assert about is not None
    print(
        f"{args.output}: {artifact.model} in INT8 ({about.method}, {about.kept_float} nodes in float), "
        f"{about.metric} {about.before:.4f} to {about.after:.4f}, {min(about.speedup.values()):.2f} times as fast"
    )


def _run(args: argparse.Namespace) -> None:
    from backbones.config import load_config
    from serving.config import ServingConfig
    from serving.serve import run

    run(lambda: load_config(ServingConfig, args.config, args.overrides))


def _deploy_config(args: argparse.Namespace) -> None:
    import yaml

    from backbones.config import load_config
    from serving.config import ServingConfig
    from serving.deploy import serve_config

    config = load_config(ServingConfig, args.config, args.overrides)
    print(yaml.safe_dump(serve_config(config), sort_keys=False), end="")


def _batch(args: argparse.Namespace) -> None:
    from backbones.config import load_config
    from serving.batch import run_batch
    from serving.jobs.config import BatchConfig
    from serving.jobs.report import summary_lines

    print("\n".join(summary_lines(run_batch(load_config(BatchConfig, args.config, args.overrides)))))


def _eval(args: argparse.Namespace) -> None:
    from backbones.config import read_values
    from serving.evaluate import ArtifactSource, EndpointSource, ResultsSource, Source, run_eval

    source: Source
    if args.model:
        source = ArtifactSource(args.model, args.provider)
    elif args.endpoint:
        source = EndpointSource(args.endpoint, str(read_values(args.config, args.overrides).get("model")))
    else:
        source = ResultsSource(args.predictions)
    print(run_eval(args.config, args.overrides, source)[1])


def _prove(args: argparse.Namespace) -> None:
    from serving.prove import run_prove

    run_prove(
        args.weights, args.data, args.overrides, images=args.images, model=args.model, calibration=args.calibration,
        provider=args.provider, output=args.output,
    )  # fmt: skip


def _quickstart(args: argparse.Namespace) -> None:
    from serving.quickstart import run_quickstart

    run_quickstart(args.output)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m serving", description="Artefacts: export, serve, run in batch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("export", help="weights to one ONNX file, compared with PyTorch")
    command.add_argument("--weights", required=True, help="a path, a URL, or 'timm' for the published ones")
    command.add_argument("-o", "--output", required=True, help="the .onnx file to write")
    command.add_argument("--model", help="the network's name, for weights that do not say it")
    command.add_argument("--images", metavar="DIR", help="pictures to compare on; drawn ones if not given")
    command.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the networks in the graph")
    command.add_argument("--no-nms", dest="nms", action="store_false", help="a detector's raw heads")
    command.add_argument("--score-threshold", type=float, help="of a detector, like the next two; else its weights'")
    command.add_argument("--nms-iou", type=float)
    command.add_argument("--max-detections", type=int)
    command.set_defaults(run=_export)

    command = commands.add_parser("inspect", help="what an artefact says about itself, and its graph")
    command.add_argument("file", metavar="FILE.onnx")
    command.add_argument("--json", action="store_true", help="all of it, for programs")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("quantize", help="a float artefact to INT8, with its accuracy and speed measured")
    command.add_argument("model", metavar="FILE.onnx")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="values over the config's")
    command.add_argument("-o", "--output", required=True, help="the .onnx file to write")
    command.add_argument("--config", required=True, help="the YAML file whose data accuracy is measured on")
    command.add_argument(
        "--calibration", metavar="DIR", help="images to choose ranges on, not the config's training split"
    )
    command.add_argument("--images", type=at_least(1), help="how many of them, 200 if there are so many")
    command.add_argument("--method", choices=("auto", "minmax", "percentile", "entropy"), default="auto")
    command.add_argument("--max-drop", type=float, default=0.5, help="points of top-1 or AP50 that may be lost")
    command.add_argument("--force", action="store_true", help="write it even if it lost more or is not faster")
    command.set_defaults(run=_quantize)

    command = commands.add_parser(
        "run", help="serve artefacts on Ray Serve until Ctrl-C; SIGHUP loads the config again"
    )
    add_config_arguments(command)
    command.set_defaults(run=_run)

    command = commands.add_parser("deploy-config", help="the same service for a cluster: what `serve deploy` takes")
    add_config_arguments(command)
    command.set_defaults(run=_deploy_config)

    command = commands.add_parser("batch", help="predict many images on Ray Data, or what is missing of them")
    add_config_arguments(command)
    command.set_defaults(run=_batch)

    command = commands.add_parser("eval", help="top-1 or AP50 of an artefact, an endpoint or a batch job's results")
    add_config_arguments(command)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FILE.onnx")
    source.add_argument("--endpoint", metavar="URL", help="of a server or of one of its models")
    source.add_argument("--predictions", metavar="FOLDER", help="a model's, that `serving batch` wrote")
    command.add_argument("--provider", choices=PROVIDERS, default="auto", help="for --model")
    command.set_defaults(run=_eval)

    command = commands.add_parser("prove", help="one number: checkpoint, artefact, INT8, endpoint and batch job")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="values over the config's")
    command.add_argument("--weights", required=True, help="a path, a URL, or 'timm' for the published ones")
    command.add_argument("--data", required=True, help="a config, a folder of classes' folders, or COCO annotations")
    command.add_argument("--images", metavar="DIR", help="of COCO annotations; 'images' beside them if not given")
    command.add_argument("--model", help="the network's name, for weights that do not say it")
    command.add_argument("--calibration", metavar="DIR", help="images to choose INT8's ranges on; else the data's own")
    command.add_argument("--provider", choices=PROVIDERS, default="auto", help="of artefacts, endpoint and batch job")
    command.add_argument("--output", default="runs/prove", metavar="DIR")
    command.set_defaults(run=_prove)

    command = commands.add_parser("quickstart", help="the whole line on drawn data, in minutes on a laptop's CPU")
    command.add_argument("--output", default="runs/quickstart", metavar="DIR")
    command.set_defaults(run=_quickstart)

    run_command(parser, argv)


if __name__ == "__main__":
    main()
