"""The page of what was measured: of each part the machine, versions, command, tables and pictures."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backbones.errors import InputError
from backbones.files import read_json, write_aside
from benchmarks.contest import table
from benchmarks.parts import GPU_PARTS, PARTS, Part, read_runs
from benchmarks.plots import draw

ALL = PARTS | GPU_PARTS
PICTURES = Path("pictures") / "benchmarks"  # beside the page
HEAD = """# Benchmarks

What `python -m benchmarks run` measured, and on a GPU `benchmarks/gpu.sh`; `python -m benchmarks page` wrote this page
and drew its pictures from their JSON. Each part is one command, whose contestants have their turns side by side in one
run, so that what else the machine does falls on all of them. Peers are their packages as published, unmodified: servers
each in an environment of its own, libraries in this project's, since they take turns in one process.
"""
QUICK = "**A smoke run (`--quick`) of few rounds and short turns: its figures show that it works and measure nothing.**"


def write_page(folders: Sequence[Path], page: Path) -> None:
    """Write the page of the folders' parts, a chapter a folder, and its pictures in `pictures/benchmarks/` beside it.

    Raises:
        InputError: a folder without results, or two with the same part.
    """
    if page.suffix != ".md":
        raise InputError(f"-o {page}: the page's name ends in .md")
    lines, seen = [HEAD], set[str]()
    for folder in folders:
        runs = read_runs(folder)
        if not runs:
            raise InputError(f"{folder} has no results: make them by python -m benchmarks run -o {folder}")
        if twice := seen & runs.keys():
            raise InputError(f"{folder} has {min(twice)}, as a folder before it: leave one of them out")
        seen |= runs.keys()
        here = read_json(folder / "machine.json")
        lines += [f"## On {'; '.join(here['gpus']) or here['cpu']}", "", *_machine(here), ""]
        for name in (name for name in ALL if name in runs):  # in the table's order
            lines += _section(name, ALL[name], runs[name], here, folder, page.parent)
    with write_aside(page) as aside:
        aside.write_text("\n".join(lines), encoding="utf-8")


def _machine(here: dict[str, Any]) -> list[str]:
    simd = f" ({', '.join(here['simd'])})" if here["simd"] else ""
    rows = [
        ["CPU", here["cpu"] + simd], ["cores used", str(here["cores"])], ["memory", f"{here['memory_gib']} GiB"],
        ["GPU", "; ".join(here["gpus"]) or "none"], ["system", f"{here['system']}, Python {here['python']}"],
    ]  # fmt: skip
    return table(["machine", ""], rows)


def _section(
    name: str, part: Part, run: dict[str, Any], here: dict[str, Any], folder: Path, beside: Path
) -> Iterator[str]:
    module: Any = importlib.import_module(f"benchmarks.{part.module}")
    yield from (f"### {part.title}", "", *run["about"].splitlines(), "", "```bash", " ".join(run["command"]), "```", "")
    path = folder / f"{name}.json"
    result = read_json(path) if path.exists() else None
    versions = result["versions"] if result else {}
    facts = [run["date"], f"{run['seconds']:.0f} s", f"{'; '.join(here['gpus']) or here['cpu']}, {here['cores']} cores"]
    yield from (f"{', '.join([*facts, *(f'{package} {version}' for package, version in versions.items())])}.", "")
    if run["quick"]:
        yield from (QUICK, "")
    if run["problem"]:
        yield from (f"**This part failed: {run['problem']}.**", "")
    if result:
        yield from (module.markdown(result).strip(), "")
        for picture, text in draw(part.module, name, result, beside / PICTURES):
            yield from (f"![{text}]({(PICTURES / picture.name).as_posix()})", "")
