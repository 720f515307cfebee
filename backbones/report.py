"""An evaluation's folder: per-class and per-image tables, and pictures of what goes wrong; no torch here.

The same outcomes draw the same bytes, whatever the user's matplotlib settings. Shapes: M images, C classes.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from backbones.files import write_aside, write_csv
from backbones.metrics import Calibration, Outcomes
from backbones.preprocess import Pixels

MATRIX = 50  # classes that a readable confusion matrix holds
NUMBERS = 20  # classes whose cells have room for a number
PAIRS = 30  # of the most confused classes, where there are more
SHEET, TILE, LINE = 6, 176, 14  # tiles a side; pixels of a tile's image and of a line under it


def write_report(
    folder: str | Path,
    outcomes: Outcomes,
    per_class: Mapping[str, Mapping[str, float]],
    calibration: Calibration,
    pixels: Callable[[int], Pixels],
) -> None:
    """Write the tables and pictures; `pixels` gives the image, uint8 [H, W, 3], at a position of the data set."""
    folder = Path(folder)
    keys = ("images", "top1", "top5")
    rows = ([name, *(figures[key] for key in keys)] for name, figures in per_class.items())
    write_csv(folder / "per_class.csv", ["class", *keys], rows)
    best = [f"predicted_{place}" for place in range(1, outcomes.ranked.shape[1] + 1)]
    write_csv(folder / "predictions.csv", ["file", "target", *best, "confidence"], _rows(outcomes))
    with matplotlib.style.context(["default", {"text.parse_math": False}]):  # a class may be called $
        _save(folder / "confusion.png", confusion(outcomes))
        _save(folder / "reliability.png", reliability(calibration))
    with write_aside(folder / "mistakes.jpg") as aside:
        mistakes(outcomes, pixels).save(aside, quality=90)


def _rows(outcomes: Outcomes) -> Iterator[list[Any]]:
    names = outcomes.classes
    columns = (outcomes.files, outcomes.targets, outcomes.ranked, outcomes.confidence)
    for file, target, ranked, confidence in zip(*columns, strict=True):
        yield [file, names[target], *(names[index] for index in ranked), f"{confidence:.6f}"]


def _save(path: Path, figure: Figure) -> None:
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=100, metadata={"Software": None})


def confusion(outcomes: Outcomes) -> Figure:
    """The confusion matrix of the classes that the images have or, if there are many, the most confused pairs."""
    present = np.unique(outcomes.targets)
    return _matrix(outcomes, present) if len(present) <= MATRIX else _pairs(outcomes)


def _matrix(outcomes: Outcomes, present: npt.NDArray[np.int64]) -> Figure:
    """Rows are the truth, columns what was predicted; a class without images is in the last column, if need be."""
    k = len(present)
    names = [outcomes.classes[index] for index in present]
    column = np.full(len(outcomes.classes), k)
    column[present] = np.arange(k)
    counts = np.zeros((k, k + 1), dtype=np.int64)
    np.add.at(counts, (column[outcomes.targets], column[outcomes.ranked[:, 0]]), 1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    if counts[:, k].any():
        names_predicted = [*names, "any other"]
    else:
        names_predicted, counts, shares = names, counts[:, :k], shares[:, :k]
    side = 3 + 0.28 * max(k, 8)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class's images", shrink=0.8)
    axes.set_xticks(range(len(names_predicted)), names_predicted, rotation=90, fontsize=8)
    axes.set_yticks(range(k), names, fontsize=8)
    axes.set(xlabel="predicted", ylabel="truth")
    if k <= NUMBERS:
        for row, col in np.argwhere(counts):
            color = "white" if shares[row, col] > 0.5 else "black"
            axes.text(col, row, str(counts[row, col]), ha="center", va="center", fontsize=7, color=color)
    return figure


def confused_pairs(outcomes: Outcomes) -> list[tuple[int, int, int]]:
    """(images, truth, prediction) of each pair of different classes that was confused, the most frequent first."""
    wrong = outcomes.ranked[:, 0] != outcomes.targets
    pairs = np.stack([outcomes.targets[wrong], outcomes.ranked[wrong, 0]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    rows = [(int(count), int(truth), int(predicted)) for (truth, predicted), count in zip(found, counts, strict=True)]
    return sorted(rows, key=lambda row: (-row[0], row[1], row[2]))


def _pairs(outcomes: Outcomes) -> Figure:
    """A bar for each of the most confused pairs."""
    rows = confused_pairs(outcomes)[:PAIRS]
    totals = np.bincount(outcomes.targets, minlength=len(outcomes.classes))
    figure = Figure(figsize=(9, 1.5 + 0.27 * PAIRS), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(rows)), [count for count, *_ in rows], color="#1f77b4")
    labels = [f"{outcomes.classes[truth]} taken for {outcomes.classes[wrong]}" for _, truth, wrong in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    for place, (count, truth, _) in enumerate(rows):
        axes.text(count, place, f" {count} of {totals[truth]}", va="center", fontsize=8)
    axes.set(
        xlabel="images", title=f"The {len(rows)} most confused pairs of {len(np.unique(outcomes.targets))} classes"
    )
    axes.set_ylim(PAIRS - 0.5, -0.5)
    axes.margins(x=0.15)
    return figure


def reliability(calibration: Calibration) -> Figure:
    """Accuracy against confidence, and how many images have which confidence."""
    bins = len(calibration.images)
    left = np.arange(bins) / bins
    figure = Figure(figsize=(5, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.bar(left, calibration.accuracy, 1 / bins, align="edge", edgecolor="white", color="#1f77b4", label="accuracy")
    some = calibration.images > 0
    top.plot(calibration.confidence[some], calibration.accuracy[some], "k.", label="at the bin's mean confidence")
    top.plot((0, 1), (0, 1), "k--", linewidth=1, label="perfect calibration")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"expected calibration error {calibration.ece:.4f}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    bottom.bar(left, calibration.images, 1 / bins, align="edge", edgecolor="white", color="#7f7f7f")
    bottom.set(xlabel="confidence", ylabel="images")
    return figure


def worst(outcomes: Outcomes, count: int) -> npt.NDArray[np.int64]:
    """Rows of the `count` wrong answers that the network is most sure of, the surest first."""
    wrong = np.flatnonzero(outcomes.ranked[:, 0] != outcomes.targets)
    return wrong[np.argsort(-outcomes.confidence[wrong], kind="stable")[:count]]


def mistakes(outcomes: Outcomes, pixels: Callable[[int], Pixels]) -> Image.Image:
    """A contact sheet of the surest wrong answers, as the network saw them, with the truth and the prediction."""
    rows = worst(outcomes, SHEET * SHEET)
    lines = max(1, -(-len(rows) // SHEET))
    cell = TILE + 3 * LINE
    sheet = Image.new("RGB", (SHEET * TILE, lines * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    if not len(rows):
        draw.text((8, 8), "no mistakes", "black", font)
    for place, row in enumerate(rows):
        x, y = place % SHEET * TILE, place // SHEET * cell
        picture = Image.fromarray(pixels(int(outcomes.indices[row]))).resize((TILE - 4, TILE - 4))
        sheet.paste(picture, (x + 2, y + 2))
        truth, predicted = (outcomes.classes[index] for index in (outcomes.targets[row], outcomes.ranked[row, 0]))
        texts = (f"truth {truth}", f"predicted {predicted}", f"confidence {outcomes.confidence[row]:.3f}")
        for line, (text, color) in enumerate(zip(texts, ("#2e7d32", "#c62828", "#555555"), strict=True)):
            draw.text((x + 4, y + TILE + line * LINE), _fit(text, font, TILE - 8), color, font)
    return sheet


def _fit(text: str, font: Any, width: int) -> str:
    """The text, cut to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
