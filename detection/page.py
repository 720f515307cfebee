"""A page of HTML that is one file: pictures lie in it, and it has no script."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .15rem .8rem; border-bottom: 1px solid #ddd; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% }
figure { display: inline-block; margin: .5rem }
figcaption { font-size: .85rem; color: #555 }
.scroll { max-height: 32rem; overflow: auto; display: inline-block }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of the parts that the functions below make."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Text to the left, numbers to the right and with four digits."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    return f'<td class="number">{value:.4f}</td>' if isinstance(value, float) else f'<td class="number">{value}</td>'


def picture(path: Path, text: str) -> str:
    """A PNG or JPEG file, with what is to be read in its place."""
    return embedded(path.read_bytes(), "jpeg" if path.suffix == ".jpg" else "png", text)


def embedded(data: bytes, kind: str, text: str) -> str:
    """An encoded picture, such as of the kind `svg+xml`, with what is to be read in its place."""
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def figure(data: bytes, kind: str, caption: str) -> str:
    """As `embedded`, with the text below it, and beside others as far as there is room."""
    return f"<figure>{embedded(data, kind, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
