"""Pictures with their results drawn on them, and the quickstart's page: the table, the curves and annotated pictures in
one HTML file without external resources; no torch here.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from backbones.files import write_aside
from detection import page
from detection.drawing import COLORS, draw_boxes
from serving.predictor import Classification, Detections


def annotate(image: Image.Image, found: Detections, classes: Sequence[str], zoom: int = 2) -> Image.Image:
    """A copy of an image, `zoom` times as large, with its detections drawn."""
    drawn = image.resize((image.width * zoom, image.height * zoom))
    order = range(len(found.scores))[::-1]  # the best on top
    texts = (f"{classes[found.indices[i]]} {found.scores[i]:.2f}" for i in order)
    colors = (COLORS[found.indices[i] % len(COLORS)] for i in order)
    draw_boxes(drawn, (found.boxes[order] * zoom).tolist(), texts, colors)
    return drawn


def picture_of(image: Image.Image, result: Classification | Detections, classes: Sequence[str]) -> Image.Image:
    """A copy of an image with its detections, or with its best class."""
    if isinstance(result, Detections):
        return annotate(image, result, classes, zoom=1)
    drawn, best = image.copy(), int(result.indices[0])
    text = f"{classes[best]} {result.probabilities[0]:.2f}"
    draw_boxes(drawn, [(0, 0, image.width - 1, image.height - 1)], [text], [COLORS[best % len(COLORS)]])
    return drawn


def curves(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel a title; in it one line a name, over epochs from 1."""
    figure = Figure(figsize=(4.5 * len(panels), 3), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in lines.items():
            axes.plot(range(1, len(values) + 1), values, marker=".", label=name)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def write_page(
    path: Path,
    title: str,
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    figure: Figure,
    pictures: Sequence[tuple[Image.Image, str]],
    notes: Sequence[str],
) -> None:
    """Write the page; `pictures` come with captions."""
    parts = [
        *map(page.paragraph, notes),
        page.table(header, table),
        page.heading("Training"),
        page.embedded(_encoded(figure.savefig, "svg"), "svg+xml", "training curves"),
        page.heading("Held-out pictures, as the endpoint sees them"),
        *(page.figure(_encoded(image.save, "png"), "png", caption) for image, caption in pictures),
    ]
    with write_aside(path) as aside:
        aside.write_text(page.page(title, parts), encoding="utf-8")


def _encoded(save: Callable[..., object], kind: str) -> bytes:
    buffer = io.BytesIO()
    save(buffer, format=kind)
    return buffer.getvalue()
