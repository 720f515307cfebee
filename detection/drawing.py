"""Boxes with labels, drawn on pictures; no torch here."""

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")  # of classes, in turn
LONGEST_JPEG = 65_500  # pixels of a side: libjpeg writes no larger ones
FARTHEST = 1e6  # pixels from the picture's corner that a box is drawn


def draw_boxes(
    image: Image.Image, boxes: Iterable[Sequence[float]], texts: Iterable[str], colors: Iterable[str], size: float = 12
) -> None:
    """Draw boxes as x1, y1, x2, y2 in the picture's pixels, each under its text, the later over the earlier; those that
    cannot be drawn, such as with NaN, are left out.

    Args:
        size: of the text, in pixels.
    """
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for (x1, y1, x2, y2), text, color in zip(boxes, texts, colors, strict=True):
        if not (-FARTHEST < x1 <= x2 < FARTHEST and -FARTHEST < y1 <= y2 < FARTHEST):
            continue
        draw.rectangle((x1, y1, x2, y2), outline=color, width=2)
        left, top, right, bottom = draw.textbbox((0, 0), text, font)
        x = max(0.0, min(x1, image.width - right))  # inside the picture, as far as there is room
        y = max(0.0, min(y1 - bottom, image.height - bottom))
        draw.rectangle((x + left, y + top, x + right, y + bottom), fill=color)
        draw.text((x, y), text, "black" if color == "white" else "white", font)
