"""What `python -m detection check-data` says of a data set: figures, findings as tables, and a contact sheet."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from backbones.errors import InputError
from backbones.files import check_writable, write_aside, write_csv, write_json
from backbones.preprocess import decode
from detection.check import check_data
from detection.drawing import draw_boxes
from detection.findings import Entry, Finding, box_of, hashable, integer, is_number, pixels

SMALL, MEDIUM = 32**2, 96**2  # COCO's limits of an object's area, in pixels
RATIOS = {1 / 4: "below 1:4", 1 / 2: "1:4 to 1:2", 1: "1:2 to 1:1", 2: "1:1 to 2:1", 4: "2:1 to 4:1"}
TILE, CAPTION, COLUMNS = 320, 18, 4  # of the contact sheet; pixels, pixels, tiles
PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075", "#f032e6")


def run_check(
    annotations: str, images: str | None, output: str | None, summary: str | None, *, whole: bool, seed: int, tiles: int
) -> dict[str, Any]:
    """Check a data set, print every finding and the figures, and return them.

    Args:
        output: folder for findings.json, findings.csv and, with `images`, contact_sheet.png.
        summary: file for the same JSON alone.
        tiles: images on the contact sheet, those with findings first, then a sample drawn by `seed`.

    Raises:
        InputError: no such file or folder.
    """
    for folder in (output, None if summary is None else Path(summary).parent):
        if folder is not None:
            check_writable(folder)
    findings, content = check_data(annotations, images, whole=whole)
    levels = Counter(finding.level for finding in findings)
    kinds = Counter((finding.level, finding.kind) for finding in findings)
    result: dict[str, Any] = {
        "errors": levels["error"],
        "warnings": levels["warning"],
        "kinds": {kind: count for (_, kind), count in sorted(kinds.items())},
        "statistics": statistics(content) if content else {},
        "findings": [_row(finding) for finding in findings],
    }
    for finding in findings:
        print(finding)
    for (level, kind), count in sorted(kinds.items()):
        print(f"{count:8} {level:8} {kind}")
    for line in describe(result["statistics"]):
        print(line)
    what = "headers read" if not whole else "decoded"
    print(f"{levels['error']} errors, {levels['warning']} warnings" + (f"; images {what}" if images else ""))
    if summary is not None:
        write_json(summary, result)
    if output is not None:
        write_json(Path(output) / "findings.json", result)
        rows = [list(row.values()) for row in result["findings"]]
        write_csv(Path(output) / "findings.csv", ("level", "kind", "what", "id", "image_id", "message"), rows)
        if images is not None and content:
            contact_sheet(Path(output) / "contact_sheet.png", content, Path(images), findings, tiles, seed)
    return result


def _row(finding: Finding) -> dict[str, Any]:
    return {
        "level": finding.level, "kind": finding.kind, "what": finding.what, "id": finding.id,
        "image_id": finding.image_id, "message": finding.message,
    }  # fmt: skip


def statistics(content: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Figures of a data set's sound entries; a crowd is no object. Sizes are COCO's, by an object's area."""
    images = [entry for entry in content["images"] if isinstance(entry, dict)]
    entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
    objects = [entry for entry in entries if not entry.get("iscrowd")]
    names = {
        hashable(c.get("id")): str(c.get("name", c.get("id"))) for c in content["categories"] if isinstance(c, dict)
    }
    boxes = [(box, entry) for entry in objects if (box := box_of(entry)) is not None and box[2] > 0 and box[3] > 0]
    areas = [entry["area"] if is_number(entry.get("area")) else box[2] * box[3] for box, entry in boxes]
    used = {hashable(entry.get("image_id")) for entry in objects}
    sides = [(pixels(entry.get("width")), pixels(entry.get("height"))) for entry in images]
    per_class = Counter(names.get(hashable(entry.get("category_id")), "unknown") for entry in objects)
    return {
        "images": len(images),
        "images_with_objects": sum(hashable(entry.get("id")) in used for entry in images),
        "images_without_objects": sum(hashable(entry.get("id")) not in used for entry in images),
        "objects": len(objects),
        "crowds": len(entries) - len(objects),
        "with_segmentation": sum(bool(entry.get("segmentation")) for entry in objects),
        "sizes": {
            "small": sum(area < SMALL for area in areas),
            "medium": sum(SMALL <= area < MEDIUM for area in areas),
            "large": sum(area >= MEDIUM for area in areas),
        },
        "box_aspect_ratios": _histogram([box[2] / box[3] for box, _ in boxes]),
        "image_aspect_ratios": _histogram([w / h for w, h in sides if w and h]),
        "per_class": dict(per_class.most_common()),
    }


def _histogram(ratios: Sequence[float]) -> dict[str, int]:
    """How many ratios of width to height lie in each part of RATIOS."""
    counts = Counter(
        next((name for limit, name in RATIOS.items() if ratio < limit), "4:1 and above") for ratio in ratios
    )
    return {name: counts[name] for name in (*RATIOS.values(), "4:1 and above")}


def describe(figures: Mapping[str, Any]) -> list[str]:
    """The statistics, a line each."""
    lines = []
    for key, value in figures.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        lines.append(f"{key.replace('_', ' ')}: " + ", ".join(f"{name} {count}".strip() for name, count in parts))
    return lines


def contact_sheet(
    path: Path, content: Mapping[str, list[Any]], folder: Path, findings: Sequence[Finding], tiles: int, seed: int
) -> None:
    """Draw images with their boxes and class names: those with findings first, then a seeded sample."""
    images = {e["id"]: e for e in content["images"] if isinstance(e, dict) and integer(e.get("id")) is not None}
    if not images:
        return
    of_image: dict[Any, list[Entry]] = defaultdict(list)
    for entry in content["annotations"]:
        if isinstance(entry, dict):
            of_image[hashable(entry.get("image_id"))].append(entry)
    defects = Counter(finding.image_id for finding in findings)
    ids = list(images)
    random.Random(seed).shuffle(ids)
    shown = sorted(ids, key=lambda key: not defects[key])[:tiles]  # stable: the sample's order within each part
    names = {hashable(c.get("id")): str(c.get("name")) for c in content["categories"] if isinstance(c, dict)}
    rows, cell = -(-len(shown) // COLUMNS), TILE + CAPTION
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, key in enumerate(shown):
        left, top = i % COLUMNS * TILE, i // COLUMNS * cell
        name = images[key].get("file_name")
        sheet.paste(_tile(folder / str(name), of_image[key], names), (left, top + CAPTION))
        note = f"{defects[key]} findings, " if defects[key] else ""
        draw.text((left + 3, top + 2), f"{key}: {note}{name}"[:50], "red" if defects[key] else "black", font)
    with write_aside(path) as aside:
        sheet.save(aside)


def _tile(path: Path, entries: Sequence[Entry], names: Mapping[Any, str]) -> Image.Image:
    """An image of at most TILE pixels a side with its boxes; crowds are white."""
    try:
        picture = decode(path)
    except InputError:
        broken = Image.new("RGB", (TILE, TILE // 2), "#dddddd")
        ImageDraw.Draw(broken).text((10, 10), "cannot be decoded", "red", ImageFont.load_default(14))
        return broken
    scale = TILE / max(picture.size)
    picture = picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
    boxes, texts, colors = [], [], []
    for entry in entries:
        box = box_of(entry)
        if box is None:
            continue
        key = hashable(entry.get("category_id"))
        boxes.append([value * scale for value in (box[0], box[1], box[0] + box[2], box[1] + box[3])])
        texts.append(names.get(key, "unknown"))
        colors.append("white" if entry.get("iscrowd") else PALETTE[(integer(key) or 0) % len(PALETTE)])
    draw_boxes(picture, boxes, texts, colors, size=11)
    return picture
