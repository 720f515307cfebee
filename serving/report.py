"""Pictures with their results drawn on them, and the quickstart's page: the table, the curves and annotated pictures in
one HTML file without external resources; no torch here.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from backbones.files import write_aside
from detection.drawing import COLORS, draw_boxes
from serving.predictor import Classification, Detections

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem 1rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
figure {{ display: inline-block; margin: .5rem }}
figcaption {{ font-size: .85rem; color: #555 }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table)
    parts = [
        "".join(f"<p>{html.escape(note)}</p>" for note in notes),
        f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr>{rows}</table>",
        f'<h2>Training</h2><img alt="training curves" src="{_data_url(buffer.getvalue(), "image/svg+xml")}">',
        "<h2>Held-out pictures, as the endpoint sees them</h2>",
        *(_figure(image, caption) for image, caption in pictures),
    ]
    with write_aside(path) as aside:
        aside.write_text(_PAGE.format(title=html.escape(title), body="\n".join(parts)), encoding="utf-8")


def _figure(image: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    text = html.escape(caption)
    source = _data_url(buffer.getvalue(), "image/png")
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
