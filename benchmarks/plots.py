"""Pictures of what the benchmarks measured; no torch here. The same figures draw the same bytes.

A plot takes a module's result as its JSON has it, and gives nothing where that has not what it shows; its docstring is
the picture's text for those who do not see it.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from backbones.files import write_aside

Result = Any
Plot = Callable[[Result], Figure | None]
STYLE = {
    "svg.hashsalt": "cspnet", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.grid": True,
    "grid.alpha": 0.3, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def draw(module: str, part: str, result: Result, folder: Path) -> Iterator[tuple[Path, str]]:
    """Write each picture of the module's result as SVG; yield its path and its text."""
    for plot in PLOTS.get(module, ()):
        with matplotlib.style.context(["default", STYLE]):
            figure = plot(result)
            if figure is None:
                continue
            path = folder / f"{part}_{plot.__name__}.svg"
            with write_aside(path) as aside:
                figure.savefig(aside, format="svg", metadata={"Date": None, "Creator": None})
        yield path, " ".join(str(plot.__doc__).split())


def bars(rows: Mapping[str, Mapping[str, float]], label: str, bar_at: float | None = None) -> Figure:
    """Horizontal bars: a group a row, in it a bar a name, always in the name's colour."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure = Figure(figsize=(7.5, 1.1 + 0.19 * sum(len(row) + 1 for row in rows.values())), layout="constrained")
    axes: Axes = figure.subplots()
    at, ticks, labelled = 0.0, [], set()
    for row in rows.values():
        ticks.append(at + (len(row) - 1) / 2)
        for name, value in row.items():
            title = "" if name in labelled else name
            drawn = axes.barh(at, value, color=f"C{names.index(name) % 10}", label=title)
            axes.bar_label(drawn, [f"{value:.3g}"], padding=3, fontsize=7)
            labelled.add(name)
            at += 1
        at += 1
    axes.set_yticks(ticks, list(rows))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    if bar_at is not None:
        axes.axvline(bar_at, color="black", linewidth=1)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _logarithmic(axes: Axes, which: str) -> None:
    """With plain numbers at 1, 2 and 5 of each decade."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def median(turns: Sequence[Any], *keys: str) -> float:
    """Of the value at the keys of each turn."""

    def value(turn: Any) -> float:
        for key in keys:
            turn = turn[key]
        return float(turn)

    return statistics.median(map(value, turns))


def accuracies(result: Result) -> Figure | None:
    """Published top-1 over the images a second of onnxruntime in batches, where it is of that size, and over the
    multiply-adds that it took, of the best
    """
    size, points = result["settings"]["size"], []
    for name, figures in result["models"].items():
        speeds = {(row["runtime"], row["batch"]): row["images_per_s"][name] for row in figures["speeds"]}
        speed = max(((batch, value) for (runtime, batch), value in speeds.items() if runtime == "onnxruntime"))[1]
        if published := figures["published"]:
            best = max(published, key=lambda figure: figure["top1"])
            here = max((figure["top1"] for figure in published if figure["size"] == size), default=math.nan)
            points.append((name, (speed, here), (best["gmacs"], best["top1"])))
    if not points:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for i, (name, *places) in enumerate(points):
        for axes, (x, y) in zip(panels, places, strict=True):
            axes.plot(x, y, "o", color=f"C{i % 10}", label=name)
    for axes, label in zip(
        panels, (f"images a second at {size}²", "GMACs at the size it was published for"), strict=True
    ):
        _logarithmic(axes, "x")
        axes.set_xlabel(label)
    panels[0].set_ylabel("top-1, %, published by others")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def speeds(result: Result) -> Figure:
    """Images a second of each network in the largest batch, by runtime"""
    most = max(row["batch"] for figures in result["models"].values() for row in figures["speeds"])
    rows = {
        name: {row["runtime"]: row["images_per_s"][name] for row in figures["speeds"] if row["batch"] == most}
        for name, figures in result["models"].items()
    }
    return bars(rows, f"images a second, batch {most}")


def ratios(result: Result) -> Figure:
    """The speed of the artefact in onnxruntime over the others', by model and batch size: 1 is as fast"""
    rows = {
        f"{name}, batch {size}": turns["ours_over"]
        for name, figures in result["models"].items()
        for size, turns in figures["batches"].items()
    }
    return bars(rows, "times as fast as …", 1)


def evaluations(result: Result) -> Figure:
    """Our speed over timm's and over the model's alone, in evaluation and in training: 1 is as fast"""
    rows = {
        f"{name}, {task}": figures[task]["ours_over"]
        for name, figures in result["models"].items()
        for task in ("evaluation", "training")
    }
    return bars(rows, "times as fast as …", 1)


def detectors(result: Result) -> Figure:
    """Time and multiply-adds of Faster R-CNN over torchvision's, by backbone, in training and inference"""
    rows = {
        f"{name}, {task}": {"time": r["ratios"]["time"], "GMACs": r["ratios"]["gmacs"]}
        for name, tasks in result["peer"].items()
        for task, r in tasks.items()
    }
    return bars(rows, "ours over torchvision's ResNet-50", 1)


def metric(result: Result) -> Figure:
    """Seconds of COCO's figures by metric: fast and by pycocotools"""
    return bars({"12 figures": result["seconds"]}, "seconds")


def loops(result: Result) -> Figure | None:
    """Images a second of the service, saturated, and of the bare loops"""
    if "bare" not in result:
        return None
    rows = {
        name: {
            "service": median(turns, "saturated", "requests_per_s"),
            **{f"loop, {kind}": median(turns, "loops", kind) for kind in turns[0]["loops"]},
        }
        for name, turns in result["bare"].items()
    }
    return bars(rows, "images a second")


def clients(result: Result) -> Figure | None:
    """Requests a second, median and 99th percentile of the latency over the number of clients, by server"""
    if "peers" not in result:
        return None
    models = result["peers"]
    figure = Figure(figsize=(10, 3.2 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 3, squeeze=False)
    shown = {"requests_per_s": "requests a second", "p50_ms": "p50, ms", "p99_ms": "p99, ms"}
    for row, (model, servers) in zip(panels, models.items(), strict=True):
        for axes, (key, label) in zip(row, shown.items(), strict=True):
            for name, turns in servers.items():
                counts = list(turns[0]["clients"])
                values = [median(turns, "clients", count, key) for count in counts]
                axes.plot([int(count) for count in counts], values, marker="o", markersize=4, label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks([int(count) for count in counts], counts)
            axes.set(xlabel="clients", title=f"{model}: {label}")
            if key == "requests_per_s":
                axes.set_ylim(bottom=0)
            else:
                _logarithmic(axes, "y")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def jobs(result: Result) -> Figure:
    """Images a second of the batch job and of the loops over the same files"""
    return bars({name: figures["images_per_s"] for name, figures in result["models"].items()}, "images a second")


def job_memory(result: Result) -> Figure:
    """Memory of a batch job over the number of its images"""
    titles = {"job_mib": "the job", "largest_worker_mib": "its largest process", "all_mib": "all processes"}
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for key, title in titles.items():
        axes.plot([job["images"] for job in result["jobs"]], [job[key] for job in result["jobs"]], "o-", label=title)
    axes.set(xlabel="images", ylabel="MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def service_memory(result: Result) -> Figure | None:
    """Memory of the service's processes over the minutes of the soak"""
    if "soak" not in result["parts"]:
        return None
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    seconds, held = zip(*result["parts"]["soak"]["memory_mb"], strict=True)
    axes.plot([second / 60 for second in seconds], held)
    axes.set(xlabel="minutes", ylabel="MB")
    axes.set_ylim(bottom=0)
    return figure


def providers(result: Result) -> Figure:
    """Images a second over the batch size, by provider and precision, beside PyTorch"""
    models = {name: figures["batches"] for name, figures in result["models"].items() if figures["batches"]}
    figure = Figure(figsize=(7.5, 3.4 * max(1, len(models))), layout="constrained")
    panels = figure.subplots(max(1, len(models)), squeeze=False)[:, 0]
    for axes, (name, batches) in zip(panels, models.items(), strict=True):
        titles = dict.fromkeys(title for turns in batches.values() for title in turns["images_per_s"])
        for title in titles:
            sizes = [size for size, turns in batches.items() if title in turns["images_per_s"]]
            values = [batches[size]["images_per_s"][title] for size in sizes]
            dashed = "--" if title.startswith(("eager", "compiled")) else "-"
            axes.plot([int(size) for size in sizes], values, dashed, marker="o", markersize=4, label=title)
        axes.set_xscale("log", base=2)
        axes.set_xticks([int(size) for size in batches], list(batches))
        _logarithmic(axes, "y")
        axes.set(xlabel="batch", ylabel="images a second", title=name)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def roof(result: Result) -> Figure:
    """FLOP/s over FLOP a byte of each network, under the roofs of the device's copy bandwidth and matrix rates"""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    bandwidth, rows = result["bytes_per_s"], result["networks"]
    reach = [row["flops"] / row["bytes"] for row in rows] + [rate / bandwidth for rate in result["flops"].values()]
    left, right = min(reach) / 2, 2 * max(reach)
    for i, (precision, rate) in enumerate(result["flops"].items()):
        ridge = rate / bandwidth
        axes.plot([left, ridge, right], [left * bandwidth / 1e12, rate / 1e12, rate / 1e12], color=f"C{i}")
        axes.annotate(f"{precision} roof", (right, rate / 1e12), ha="right", va="bottom", color=f"C{i}", fontsize=8)
        markers = "os^vDP"
        names = list(dict.fromkeys(row["model"] for row in rows))
        for row in (row for row in rows if row["precision"] == precision):
            for way, speed in row["images_per_s"].items():
                x, y = row["flops"] / row["bytes"], row["flops"] * speed / row["batch"] / 1e12
                marker = markers[names.index(row["model"]) % len(markers)]
                axes.plot(x, y, marker, color=f"C{i}", fillstyle="none" if way == "eager" else "full")
    for name, marker in zip(names, markers, strict=False):
        axes.plot([], [], marker, color="grey", label=name)
    axes.plot([], [], "o", color="grey", fillstyle="none", label="hollow: eager")
    _logarithmic(axes, "xy")
    axes.set(xlabel="FLOP a byte", ylabel="TFLOP/s")
    axes.legend(fontsize=8, loc="lower right")
    return figure


PLOTS: dict[str, tuple[Plot, ...]] = {
    "backbones": (accuracies, speeds),
    "export": (ratios,),
    "imagenet_eval": (evaluations,),
    "detection": (detectors,),
    "coco_metric": (metric,),
    "serving": (loops, clients),
    "batch": (jobs,),
    "batch_memory": (job_memory,),
    "stress": (service_memory,),
    "gpu": (providers,),
    "roofline": (roof,),
}
