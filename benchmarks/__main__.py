"""python -m benchmarks {run,gpu,page}: all benchmarks by one command, and the page of what they measured.

    python -m benchmarks run [--parts backbones export …] [--quick] [--root DIR] [-o FOLDER]
    python -m benchmarks gpu [--dry] [-o FOLDER]
    python -m benchmarks page FOLDER … [-o docs/benchmarks.md]

Each part is a command of its own; one that fails is reported, the others go on, and the exit status is 1. `--quick` is
few rounds and short turns: that it works, and no measurement. `gpu` is what a CUDA machine changes, in less than nine
minutes; `benchmarks/gpu.sh` calls it.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from backbones.cli import run_command
from backbones.errors import InputError
from benchmarks.parts import GPU_PARTS, PARTS, run_parts


def _run(args: argparse.Namespace) -> None:
    root = {} if args.root is None else {"imagenet": ["--root", str(args.root)]}
    _report(run_parts({name: PARTS[name] for name in args.parts}, args.output, args.quick, root))


def _gpu(args: argparse.Namespace) -> None:
    from serving.sessions.providers import driver_problem

    if not args.dry and (problem := driver_problem()):
        raise InputError(f"no CUDA device here: {problem}; --dry runs the same on the CPU, with tiny settings")
    _report(run_parts(GPU_PARTS, args.output, quick=args.dry))


def _report(failed: list[str]) -> None:
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _page(args: argparse.Namespace) -> None:
    from benchmarks.page import write_page

    write_page(args.folders, args.output)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="measure into FOLDER")
    run.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    run.add_argument("--quick", action="store_true", help="a smoke run: its figures are no measurements")
    run.add_argument(
        "--root", type=Path, metavar="DIR", help="real images for the part imagenet, which draws some else"
    )
    run.add_argument("-o", "--output", type=Path, default=Path("runs/benchmarks"), metavar="FOLDER")
    run.set_defaults(run=_run)

    gpu = commands.add_parser("gpu", help="measure what a CUDA machine changes")
    gpu.add_argument("--dry", action="store_true", help="a smoke run on the CPU")
    gpu.add_argument("-o", "--output", type=Path, default=Path("runs/benchmarks_gpu"), metavar="FOLDER")
    gpu.set_defaults(run=_gpu)

    page = commands.add_parser("page", help="write the page of the folders' results, and its pictures")
    page.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    page.add_argument("-o", "--output", type=Path, default=Path("docs/benchmarks.md"), metavar="FILE.md")
    page.set_defaults(run=_page)
    run_command(parser, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the part's processes end with us
    main()
