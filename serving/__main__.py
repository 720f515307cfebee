"""python -m serving {export,run,batch,eval,quickstart}."""

import argparse
from collections.abc import Sequence

from backbones.cli import add_config_arguments, run_command


def _export(args: argparse.Namespace) -> None:
    from serving.export import run_export

    artifact = run_export(args.weights, args.output, model=args.model, images=args.images)
    parity = artifact.parity
    differences = ", ".join(f"{name} {value:.2g}" for name, value in parity.largest.items())
    matched = f" with {parity.detections} detections of both" if artifact.task == "detection" else ""
    print(f"{args.output}: {artifact.model}, {len(artifact.classes)} classes, {artifact.preprocess}")
    print(f"largest difference from PyTorch on {parity.images} pictures{matched}: {differences}")
    if artifact.task == "detection" and not parity.detections:
        print("no detection was compared: export with --images FOLDER of pictures that show objects")


def _run(args: argparse.Namespace) -> None:
    from backbones.config import load_config
    from serving.config import ServingConfig
    from serving.serve import run

    run(load_config(ServingConfig, args.config, args.overrides))


def _batch(args: argparse.Namespace) -> None:
    from serving.batch import run_batch

    summary = run_batch(
        args.model, args.input, args.output, batch_size=args.batch_size, actors=args.actors,
        num_gpus=args.num_gpus, provider=args.provider,
    )  # fmt: skip
    print(
        f"{summary['output']}: {summary['images']} images, {summary['errors']} errors, "
        f"{summary['seconds']:.1f} s, {summary['images_per_s']:.1f} images/s"
    )


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
    command.set_defaults(run=_export)

    command = commands.add_parser("run", help="serve artefacts on Ray Serve until Ctrl-C")
    add_config_arguments(command)
    command.set_defaults(run=_run)

    command = commands.add_parser("batch", help="predict a folder of images on Ray Data")
    command.add_argument("--model", required=True, metavar="FILE.onnx")
    command.add_argument("--input", required=True, help="a folder, an image, or a .txt file of paths")
    command.add_argument("--output", required=True, metavar="FILE.parquet")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--actors", type=int, default=1)
    command.add_argument("--num-gpus", type=float, default=0, help="of each actor; a fraction shares a GPU")
    command.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto")
    command.set_defaults(run=_batch)

    command = commands.add_parser("eval", help="top-1 or AP50 of an artefact, an endpoint or a batch job's results")
    add_config_arguments(command)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FILE.onnx")
    source.add_argument("--endpoint", metavar="URL", help="of a server or of one of its models")
    source.add_argument("--predictions", metavar="FILE.parquet", help="what `serving batch` wrote")
    command.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="for --model")
    command.set_defaults(run=_eval)

    command = commands.add_parser("quickstart", help="the whole line on drawn data, in minutes on a laptop's CPU")
    command.add_argument("--output", default="runs/quickstart", metavar="DIR")
    command.set_defaults(run=_quickstart)

    run_command(parser, argv)


if __name__ == "__main__":
    main()
