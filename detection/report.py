"""An evaluation's folder: figures as CSV and JSON, pictures of what goes wrong, and one page of it all.

The same findings draw the same bytes, whatever the user's matplotlib settings. Shapes as in `matching.py`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from backbones.files import write_aside, write_csv, write_json
from backbones.preprocess import decode
from detection.analysis import KINDS, RECALLS, Analysis
from detection.coco_eval import FIGURES
from detection.drawing import draw_boxes
from detection.matching import NONE
from detection.page import heading, page, paragraph, picture, table

PANELS = 100  # classes whose curves are drawn
MATRIX = 100  # classes of a confusion matrix that can be drawn
NUMBERS = 20  # classes whose cells have room for a number
WORST = 12  # images
TILE, LINE = 480, 16  # pixels of a drawn image's longer side, and of a line of text
GREEN, RED, GRAY = "#2e7d32", "#c62828", "#757575"
PICTURES = {  # heading and text on the page
    "errors.png": (
        "Kinds of errors",
        "Each detection that finds nothing and each object that is not found has one kind, after TIDE (arXiv "
        "2008.08115).",
    ),
    "confusion.png": (
        "Confusion matrix",
        "At the score with the best F1 of all classes together: {threshold}, F1 {f1}. The last row is false alarms, "
        "the last column objects that were missed.",
    ),
    "precision_recall.png": ("Precision and recall", "The mean of a class's curve is its AP50."),
    "worst.jpg": (
        "The images with the most errors",
        "Truth beside prediction at scores from {threshold}: right in green, missed or wrong in red, crowds and what "
        "lies on them in grey.",
    ),
}


def write_report(folder: str | Path, result: Mapping[str, Any], found: Analysis, paths: Mapping[int, Path]) -> None:
    """Write the tables, the pictures and the page.

    Args:
        result: as `eval.json` has it.
        paths: of the images by their ids; without them no image is drawn.
    """
    folder = Path(folder)
    _tables(folder, result, found)
    with matplotlib.style.context(["default", {"text.parse_math": False}]):  # a class may be called $
        _save(folder / "errors.png", errors_figure(found))
        _save(folder / "confusion.png", confusion_figure(found))
        _save(folder / "precision_recall.png", curves_figure(found))
    (folder / "worst.jpg").unlink(missing_ok=True)
    if paths:
        with write_aside(folder / "worst.jpg") as aside:
            worst_sheet(found, paths).save(aside, quality=85)
    write_json(folder / "report.json", dict(result) | as_json(found))
    with write_aside(folder / "report.html") as aside:
        aside.write_text(_page(folder, result, found), encoding="utf-8")


def as_json(found: Analysis) -> dict[str, Any]:
    """What the pictures show, as numbers."""
    names = found.scenes.classes
    return {
        "precision_recall": {
            "recall": RECALLS.round(2).tolist(),
            "precision": {name: curve.tolist() for name, curve in found.curves.items()},
        },
        "confusion": {
            "rows": [*names, "background"],
            "columns": [*names, "missed"],
            "counts": found.confusion.tolist(),
        },
        "worst": [
            {"image_id": int(found.scenes.image_ids[index]), "errors": int(found.errors[index])}
            for index in worst_images(found)
        ],
    }


def _tables(folder: Path, result: Mapping[str, Any], found: Analysis) -> None:
    kinds = _figures_of(result)
    write_csv(folder / "figures.csv", ["figure", *kinds], _figure_rows(kinds))
    write_csv(folder / "per_class.csv", _class_header(kinds), _class_rows(kinds, found))
    curves = found.curves.values()
    points = ([f"{recall:.2f}", *values] for recall, *values in zip(RECALLS.tolist(), *curves, strict=True))
    write_csv(folder / "precision_recall.csv", ["recall", *found.curves], points)
    names = found.scenes.classes
    rows = ([name, *row] for name, row in zip([*names, "background"], found.confusion.tolist(), strict=True))
    write_csv(folder / "confusion.csv", ["truth", *names, "missed"], rows)
    kind_rows = ([name, kind["count"], kind["dAP50"]] for name, kind in found.kinds["kinds"].items())
    write_csv(folder / "errors.csv", ["kind", "count", "dAP50"], kind_rows)


def _figures_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of boxes and, if there are any, of masks."""
    return {"bbox": result} | ({"segm": result["segm"]} if "segm" in result else {})


def _figure_rows(kinds: Mapping[str, Mapping[str, Any]]) -> Iterator[list[Any]]:
    for name in FIGURES:
        yield [name, *(figures[name] for figures in kinds.values())]


def _class_header(kinds: Mapping[str, Any]) -> list[str]:
    return ["class", "objects", "detections", *(f"{kind}_{name}" for kind in kinds for name in ("AP", "AP50"))]


def _class_rows(kinds: Mapping[str, Mapping[str, Any]], found: Analysis) -> Iterator[list[Any]]:
    given = found.scenes
    objects = np.bincount(given.truth_labels[~given.crowd], minlength=len(given.classes)).tolist()
    detections = np.bincount(given.labels, minlength=len(given.classes)).tolist()
    for name, count, seen in zip(given.classes, objects, detections, strict=True):
        values = [figures["per_class"].get(name, {}) for figures in kinds.values()]
        yield [name, count, seen, *(value.get(key, "") for value in values for key in ("AP", "AP50"))]


def _save(path: Path, figure: Figure) -> None:
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=100, metadata={"Software": None})


def errors_figure(found: Analysis) -> Figure:
    """How many errors of each kind there are, and the AP50 that each costs."""
    kinds = found.kinds["kinds"]
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, form in zip(panels, ("dAP50", "count"), ("{:.4f}", "{}"), strict=True):
        values = [kinds[name][key] for name in KINDS]
        bars = axes.barh(range(len(KINDS)), values, color="#1f77b4")
        axes.bar_label(bars, [" " + form.format(value) for value in values], fontsize=8)
        axes.margins(x=0.2)
    panels[0].set(xlabel="AP50 gained by repairing this kind alone")
    panels[1].set(xlabel="errors, at any score")
    panels[0].set_yticks(range(len(KINDS)), list(KINDS))
    panels[0].invert_yaxis()
    return figure


def confusion_figure(found: Analysis) -> Figure:
    """Rows are the truth, columns what was predicted, as shares of the row: of the last row, of all false alarms.

    Of more classes than fit, those that most objects have.
    """
    counts, names = found.confusion, found.scenes.classes
    shown = np.sort(np.argsort(-counts[:-1].sum(axis=1), kind="stable")[:MATRIX])
    places = np.r_[shown, len(names)]
    counts = counts[np.ix_(places, places)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labels = [names[index] for index in shown]
    side = 3 + (0.28 if len(labels) <= 50 else 0.16) * max(len(labels), 8)
    size = 8 if len(labels) <= 50 else 5
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the row", shrink=0.8)
    axes.set_xticks(range(len(places)), [*labels, "missed"], rotation=90, fontsize=size)
    axes.set_yticks(range(len(places)), [*labels, "background"], fontsize=size)
    left_out = f", {len(shown)} of {len(names)} classes" if len(shown) < len(names) else ""
    axes.set(xlabel="predicted", ylabel="truth", title=f"scores from {found.threshold:.3f}{left_out}")
    if len(labels) <= NUMBERS:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    return figure


def curves_figure(found: Analysis) -> Figure:
    """A panel a class with its precision over recall and its AP50; of many classes those that most objects have."""
    objects = dict(zip(found.scenes.classes, found.confusion[:-1].sum(axis=1).tolist(), strict=True))
    most = set(sorted(found.curves, key=lambda name: -objects[name])[:PANELS])
    names = [name for name in found.curves if name in most]
    columns = min(10, max(4, int(np.ceil(np.sqrt(len(names))))))
    rows = max(1, -(-len(names) // columns))
    width, height = 1.9 * columns + 0.6, 1.8 * rows + 0.6
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    # Shared axes and a constrained layout would take half a minute for 80 panels.
    figure.subplots_adjust(0.6 / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.3 / height, 0.15, 0.25)
    for axes, name in zip(panels, names, strict=False):
        curve = found.curves[name]
        axes.fill_between(RECALLS, curve, color="#1f77b4", alpha=0.4)
        axes.set_title(f"{name[:18]}  {curve.mean():.3f}", fontsize=8)
        axes.set(xlim=(0, 1), ylim=(0, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.tick_params(labelsize=7)
        axes.label_outer()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.text(0.5, 0.08 / height, "recall", ha="center", fontsize=9)
    figure.text(0.08 / width, 0.5, "precision", va="center", rotation=90, fontsize=9)
    return figure


def worst_images(found: Analysis) -> list[int]:
    """Positions of the images with the most errors at the threshold, those with none left out."""
    order = np.argsort(-found.errors, kind="stable")[:WORST]
    return [int(index) for index in order if found.errors[index]]


def worst_sheet(found: Analysis, paths: Mapping[int, Path]) -> Image.Image:
    """Each of the worst images twice, two a row: the objects, red those that were missed; and the detections above the
    threshold, red those that are wrong, grey those on a crowd.
    """
    given, font = found.scenes, ImageFont.load_default(12)
    pairs = [_pair(found, index, paths[int(given.image_ids[index])], font) for index in worst_images(found)]
    lines = [pairs[start : start + 2] for start in range(0, len(pairs), 2)]
    heights = [max(pair.height for pair in line) for line in lines]
    sheet = Image.new("RGB", (4 * TILE, max(2 * LINE, sum(heights))), "white")
    if not pairs:
        ImageDraw.Draw(sheet).text((8, 8), "no errors", "black", font)
    top = 0
    for line, height in zip(lines, heights, strict=True):
        for column, pair in enumerate(line):
            sheet.paste(pair, (column * 2 * TILE, top))
        top += height
    return sheet


def _pair(found: Analysis, index: int, path: Path, font: Any) -> Image.Image:
    """Truth beside prediction, with a line above."""
    given, matches = found.scenes, found.matches
    shown = np.flatnonzero((given.images == index) & (given.scores >= found.threshold))
    objects = np.flatnonzero(given.truth_images == index)
    partner = matches.truth[shown]
    truth = (
        given.truth_boxes[objects],
        [given.classes[label] for label in given.truth_labels[objects]],
        [_color(g in partner, given.crowd[g]) for g in objects],
    )
    surest = shown[::-1]  # on top
    predicted = (
        given.boxes[surest],
        [f"{given.classes[given.labels[d]]} {given.scores[d]:.2f}" for d in surest],
        [_color(matches.truth[d] != NONE, matches.ignored[d]) for d in surest],
    )
    image = decode(path)
    scale = (TILE - 4) / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pair = Image.new("RGB", (2 * TILE, image.height + LINE + 4), "white")
    for side, (boxes, texts, colors) in enumerate((truth, predicted)):
        drawn = image.copy()
        corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1) * scale
        draw_boxes(drawn, corners.tolist(), texts, colors)
        pair.paste(drawn, (side * TILE, LINE))
    draw = ImageDraw.Draw(pair)
    draw.text((2, 0), f"{path.name}: {found.errors[index]} errors; truth", "black", font)
    draw.text((TILE + 2, 0), f"prediction, scores from {found.threshold:.3f}", "black", font)
    return pair


def _color(right: bool, ignored: bool) -> str:
    return GRAY if ignored else GREEN if right else RED


def _page(folder: Path, result: Mapping[str, Any], found: Analysis) -> str:
    """All of the report."""
    kinds = _figures_of(result)
    on = f"{result['images']} images"
    parts = [paragraph(_facts(result, found)), table(["figure", *kinds], _figure_rows(kinds))]
    for name, (title, text) in PICTURES.items():
        if (folder / name).exists():
            text = text.format(threshold=f"{found.threshold:.3f}", f1=f"{found.f1:.3f}")
            parts += [heading(title), paragraph(text), picture(folder / name, title)]
        if name == "errors.png":
            errors = [[kind, KINDS[kind], row["count"], row["dAP50"]] for kind, row in found.kinds["kinds"].items()]
            parts.append(table(["kind", "what it is", "count", "dAP50"], errors))
    parts += [heading("Classes"), table(_class_header(kinds), _class_rows(kinds, found))]
    return page(f"{result['model']} on {on}" if result.get("model") else on, parts)


def _facts(result: Mapping[str, Any], found: Analysis) -> str:
    weights = f"Weights {result['weights']}. " if result.get("weights") else ""
    objects = np.count_nonzero(~found.scenes.crowd)
    return (
        f"{weights}{result['detections']} detections of {objects} objects, crowds left out. Figures are fractions; "
        "-1 where there is nothing to find. The pictures are of boxes at an IoU of 0.5."
    )
