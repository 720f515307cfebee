"""What a batch job found, read back from its parts: a summary, a page without external resources, and scores; no torch
here.

Everything is counted a part at a time. Where the input says the truth, classifiers get top-1 and top-5 and detectors
COCO's figures, by the code that evaluates checkpoints; an image that could not be read counts as not recognised.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from backbones.files import write_aside, write_json
from backbones.labels import class_indices
from backbones.metrics import Accuracy
from backbones.preprocess import ImageError, decode
from detection import page
from detection.coco import CocoSet, load_annotations
from detection.coco_eval import class_names
from detection.coco_eval import evaluate as coco_figures
from serving.artifact import Artifact, ClassifierArtifact, DetectorArtifact
from serving.jobs.config import BatchConfig
from serving.jobs.exports import coco_rows
from serving.jobs.parts import INPUTS, Listing, Output, read_list
from serving.jobs.results import Row, iter_rows, parts_of, to_row
from serving.predictor import Classification
from serving.report import picture_of

LISTED = 100  # failed files that the summary names
SLOWEST = 10
BINS = 20  # of scores from 0 to 1
LABELS = 30  # that the page draws
SHEET, COLUMNS, TILE = 24, 6, 180  # tiles, in a row, pixels of a tile's side

Targets = dict[str, int]  # a label of the input to the index of the artefact's class


def check_labels(listing: Listing, artifacts: Sequence[Artifact], source: str) -> list[Targets | None]:
    """Of each classifier the class that each label of the input is.

    Raises:
        InputError: a label that it does not have.
    """
    names = sorted(listing.labels)
    targets: list[Targets | None] = []
    for artifact in artifacts:
        if names and isinstance(artifact, ClassifierArtifact):
            indices, _ = class_indices(names, source, len(artifact.classes), artifact.classes)
            targets.append(dict(zip(names, indices, strict=True)))
        else:
            targets.append(None)
    return targets


def check_truth(source: str, artifacts: Sequence[Artifact]) -> None:
    """That the detectors' categories are those of the annotations.

    Raises:
        InputError: they have none in common, or one id with two names.
    """
    if truth := _truth(source):
        names = class_names(truth)
        categories = CocoSet([], tuple(names), tuple(names.values()))
        for artifact in artifacts:
            if isinstance(artifact, DetectorArtifact):
                categories.check_categories(artifact.category_ids, artifact.classes, artifact.model)


def _truth(source: str) -> dict[str, Any] | None:
    """COCO's annotations, if the input is a file of them and has any."""
    truth = load_annotations(source) if source.endswith(".json") else None
    return truth if truth and truth["annotations"] else None


def write_report(
    config: BatchConfig,
    output: Output,
    artifacts: Sequence[Artifact],
    targets: Sequence[Targets | None],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `summary.json` and `index.html`, and return the summary. `run` is what is known of this start."""
    models = {}
    for model, artifact, target in zip(output.models, artifacts, targets, strict=True):
        models[model.name] = _counts(model) | {"metrics": _metrics(config, output, model, artifact, target)}
    first = models[output.models[0].name]
    summary = {
        "images": first["images"], **run,
        "failed": list(_failed(output)), "models": models, "config": config.model_dump(mode="json"),
    }  # fmt: skip
    write_json(output.folder / "summary.json", summary)
    for model, artifact in zip(output.models, artifacts, strict=True):
        with write_aside(model / "histograms.png") as aside:
            histograms(models[model.name]).savefig(aside, dpi=100)
        with write_aside(model / "contact_sheet.jpg") as aside:
            contact_sheet(output, model, artifact, first["images"]).save(aside, quality=90)
    with write_aside(output.folder / "index.html") as aside:
        aside.write_text(_page(config, output, summary), encoding="utf-8")
    return summary


def _counts(model: Path) -> dict[str, Any]:
    """Of one model: images, labels, scores and the slowest files. A classifier's are the best of each image."""
    images, labels, bins = 0, Counter[str](), np.zeros(BINS, np.int64)
    slowest: list[tuple[float, str]] = []
    for part in parts_of(model):
        table = pq.read_table(part, columns=["path", "status", "labels", "scores", "boxes", "decode_ms", "run_ms"])
        images += len(table)
        good = table.filter(pc.equal(table["status"], "ok"))
        found = pc.list_flatten if good["boxes"].null_count == 0 else _firsts
        labels.update(found(good["labels"]).to_pylist())
        bins += np.histogram(found(good["scores"]).to_numpy(), BINS, (0, 1))[0]
        times = pc.add(good["decode_ms"], good["run_ms"])
        slowest = heapq.nlargest(SLOWEST, [*slowest, *zip(times.to_pylist(), good["path"].to_pylist(), strict=True)])
    return {
        "images": images, "labels": dict(labels.most_common()), "scores": bins.tolist(),
        "slowest": [{"path": path, "ms": ms} for ms, path in slowest],
    }  # fmt: skip


def _firsts(lists: Any) -> Any:
    return pc.list_element(lists, 0)


def _failed(output: Output) -> Iterator[dict[str, str]]:
    """The first files with an error, by any model."""
    left = LISTED
    for model in output.models:
        for part in parts_of(model):
            table = pq.read_table(part, columns=["path", "error"], filters=pc.field("status") == "error")
            for row in table.slice(0, left).to_pylist():
                yield row | {"model": model.name}
                left -= 1


def _metrics(
    config: BatchConfig, output: Output, model: Path, artifact: Artifact, targets: Targets | None
) -> dict[str, Any]:
    if targets is not None:
        accuracy = Accuracy(artifact.classes)
        for file, row in zip(read_list(output.folder / INPUTS), iter_rows(model), strict=True):
            if file.label is not None:
                accuracy.update(_ranked(row), np.array([targets[file.label]]))
        return accuracy.compute()
    if isinstance(artifact, DetectorArtifact) and _truth(config.input):
        return coco_figures(config.input, list(coco_rows(iter_rows(model), artifact)), masks=artifact.masks)
    return {}


def _ranked(row: Row) -> Any:
    """The best classes [1, k]; -1, which is none, where there is no result."""
    return row.result.indices[None] if isinstance(row.result, Classification) else np.full((1, 1), -1)


def histograms(counts: Mapping[str, Any]) -> Figure:
    """The most frequent labels, and the scores."""
    labels = list(counts["labels"].items())[:LABELS]
    figure = Figure(figsize=(10, 1.5 + 0.2 * max(10, len(labels))), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.barh(range(len(labels)), [count for _, count in labels], color="#1f77b4")
    left.set_yticks(range(len(labels)), [name.replace("$", r"\$") for name, _ in labels], fontsize=8)
    left.invert_yaxis()
    left.set(title=f"labels ({len(labels)} of {len(counts['labels'])})", xlabel="count")
    right.bar(np.arange(BINS) / BINS, counts["scores"], 1 / BINS, align="edge", edgecolor="white", color="#7f7f7f")
    right.set(title="scores", xlim=(0, 1), ylabel="count")
    return figure


def contact_sheet(output: Output, model: Path, artifact: Artifact, images: int) -> Image.Image:
    """Pictures from all over the input, each with its result."""
    chosen = sorted({i * images // SHEET for i in range(min(SHEET, images))})
    sheet = Image.new("RGB", (COLUMNS * TILE, -(-len(chosen) // COLUMNS) * TILE), "white")
    for place, number in enumerate(chosen):
        x, y = place % COLUMNS * TILE, place // COLUMNS * TILE
        part = pq.read_table(output.part(model, number // output.rows))
        row = to_row(part.slice(number % output.rows, 1).to_pylist()[0])
        try:
            if row.result is None:
                raise ImageError(str(row.error))
            file = next(read_list(output.folder / INPUTS, number))
            drawn = picture_of(decode(file.read()), row.result, artifact.classes)
            drawn.thumbnail((TILE - 4, TILE - 4))
            sheet.paste(drawn, (x + 2, y + 2))
        except ImageError as error:
            lines = "\n".join(str(error)[i : i + 28] for i in range(0, min(len(str(error)), 168), 28))
            ImageDraw.Draw(sheet).text((x + 4, y + 4), lines, "#c62828")
    return sheet


def _page(config: BatchConfig, output: Output, summary: Mapping[str, Any]) -> str:
    speed = ""
    if summary["images_per_s"]:
        speed = f" The first began after {summary['start_s']:.1f} s, then {summary['images_per_s']:.1f} a second."
    parts = [
        page.paragraph(
            f"{summary['images']} images of {config.input}, {summary['errors']} with an error. The last start "
            f"predicted {summary['predicted']} and took {summary['total_s']:.1f} s.{speed}"
        )
    ]
    for model in output.models:
        counts = summary["models"][model.name]
        figures = {key: value for key, value in counts["metrics"].items() if isinstance(value, float)}
        parts.append(page.heading(model.name))
        if figures:
            parts.append(page.table(("figure", "value"), figures.items()))
        parts.append(page.picture(model / "histograms.png", "labels and scores"))
        parts.append(page.picture(model / "contact_sheet.jpg", "pictures with their results"))
        parts.append(page.table(("slowest file", "ms"), ((row["path"], row["ms"]) for row in counts["slowest"])))
    if summary["failed"]:
        parts.append(page.heading(f"Failed files ({len(summary['failed'])} named)"))
        parts.append(
            page.table(("file", "model", "error"), ([r["path"], r["model"], r["error"]] for r in summary["failed"]))
        )
    return page.page("Batch job", parts)


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the command prints."""
    counted = f"{summary['images']} images, {summary['errors']} errors, {summary['predicted']} predicted now"
    speed = f", {summary['images_per_s']:.1f} images/s" if summary["images_per_s"] else ""
    lines = [f"{summary['config']['output']}: {counted}{speed}"]
    for name, counts in summary["models"].items():
        shown = [key for key in ("top1", "top5", "AP", "AP50") if key in counts["metrics"]]
        if shown:
            lines.append(f"{name}: " + ", ".join(f"{key} {counts['metrics'][key]:.4f}" for key in shown))
    return lines
