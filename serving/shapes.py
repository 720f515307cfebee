"""A small data set that needs no download: shapes on textured backgrounds, as an image folder and in COCO's format."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from backbones.files import write_json

CLASSES = ("circle", "cross", "square", "triangle")
_CORNERS = {  # on the unit circle; the circle itself is drawn
    "square": [(math.cos(a), math.sin(a)) for a in (math.pi / 4 + i * math.pi / 2 for i in range(4))],
    "triangle": [(math.cos(a), math.sin(a)) for a in (i * 2 * math.pi / 3 for i in range(3))],
    "cross": [
        (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3),
        (-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3),
    ],
}  # fmt: skip
Box = tuple[float, float, float, float]


def background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random texture: coarse and fine noise over a colour."""
    coarse = rng.normal(0, 20, (height // 16 + 2, width // 16 + 2, 3))
    base = np.clip(rng.uniform(60, 195, 3) + coarse, 0, 255).astype(np.uint8)
    picture = Image.fromarray(base).resize((width, height), Image.Resampling.BICUBIC)
    fine = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + fine, 0, 255).astype(np.uint8))


def draw_shape(rng: np.random.Generator, image: Image.Image, name: str, radius: float, x: float, y: float) -> Box:
    """Draw a shape of random colour and rotation around (x, y); returns its box x1, y1, x2, y2 in pixels."""
    under = np.asarray(image.crop((int(x - 3), int(y - 3), int(x + 3), int(y + 3)))).mean((0, 1))
    colors = rng.integers(0, 256, (16, 3))
    color = tuple(int(v) for v in colors[np.abs(colors - under).sum(1).argmax()])  # it must stand out
    draw = ImageDraw.Draw(image)
    if name == "circle":
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=color)
        return box
    turn = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(turn), math.sin(turn)
    points = [(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in _CORNERS[name]]
    draw.polygon(points, fill=color)
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def draw_classification(root: Path, counts: dict[str, int], seed: int, size: int = 64) -> None:
    """`root/<split>/<class>/*.png`, one shape an image, `counts[split]` images a split."""
    for part, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, part])
        for i in range(count):
            name = CLASSES[i % len(CLASSES)]
            image = background(rng, size, size)
            radius = rng.uniform(0.2, 0.4) * size
            x, y = rng.uniform(radius, size - radius, 2)
            draw_shape(rng, image, name, radius, x, y)
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i:04d}.png")


def draw_detection(root: Path, counts: dict[str, int], seed: int, size: int = 128) -> None:
    """`root/<split>/*.jpg` and `root/<split>.json` in COCO's format; none to nine shapes an image.

    Images are landscape or portrait; category ids have gaps, as COCO's have.
    """
    categories = [{"id": 2 * i + 1, "name": name} for i, name in enumerate(CLASSES)]
    for part, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, part])
        (root / split).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            width, height = (size, size * 3 // 4) if rng.random() < 0.5 else (size * 3 // 4, size)
            image = background(rng, width, height)
            for name, box in _scatter(rng, image):
                bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": i + 1, "category_id": 2 * CLASSES.index(name) + 1,
                        "bbox": [round(v, 2) for v in bbox], "area": round(bbox[2] * bbox[3], 2), "iscrowd": 0,
                    }
                )  # fmt: skip
            file_name = f"{i:04d}.jpg"
            image.save(root / split / file_name, quality=92)
            images.append({"id": i + 1, "file_name": file_name, "width": width, "height": height})
        write_json(root / f"{split}.json", {"images": images, "annotations": annotations, "categories": categories})


def _scatter(rng: np.random.Generator, image: Image.Image) -> list[tuple[str, Box]]:
    """Draw up to nine shapes that do not touch; one image in 16 or so stays empty."""
    drawn: list[tuple[str, Box]] = []
    circles: list[tuple[float, float, float]] = []
    for _ in range(0 if rng.random() < 1 / 16 else int(rng.integers(3, 10))):
        radius = rng.uniform(0.08, 0.18) * max(image.size)
        x, y = (float(rng.uniform(radius, side - radius)) for side in image.size)
        if all(math.hypot(x - cx, y - cy) > radius + r for cx, cy, r in circles):
            name = CLASSES[int(rng.integers(len(CLASSES)))]
            drawn.append((name, draw_shape(rng, image, name, radius, x, y)))
            circles.append((x, y, radius))
    return drawn
