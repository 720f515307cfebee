"""The checks of one annotation after the other, a function a kind of thing: each yields (kind, message)."""

import math
from collections.abc import Iterator
from typing import Any

from pycocotools import mask as rle

from backbones.errors import InputError
from detection.coco import MIN_SIDE
from detection.findings import Entry, Finding, Found, Known, box_of, hashable, integer, is_number, short
from detection.masks import is_polygon, stated_size, to_rle

AREA_TOLERANCE = 0.1  # of the area that box or outline have, and 4 pixels; rasters differ from outlines by less
FAR = 0.5  # a segmentation is far from its box if their IoU, extent against box, is less
Outline = tuple[float, list[float]]  # area and extent (x, y, w, h) of a sound segmentation


def check_annotation(entry: Entry, where: Any, known: Known) -> Iterator[Finding]:
    """Findings about an annotation."""
    outline, defects = _outline(entry.get("segmentation"), known.size(entry))
    found = [*_identity(entry, known), *_bounds(entry, known), *_area(entry, outline), *_crowd(entry)]
    for kind, message in [*found, *defects, *_distance(entry, outline)]:
        yield Finding(kind, "annotation", where, message, integer(entry.get("image_id")))


def _identity(entry: Entry, known: Known) -> Found:
    key = hashable(entry.get("id"))
    if key is None:
        yield "annotation-without-id", "evaluation and training number the objects themselves"
    elif key in known.annotations:
        yield "annotation-id-twice", "an earlier one has the same id"
    known.annotations.add(key)
    for what, table in (("image", known.images), ("category", known.categories)):
        other = entry.get(f"{what}_id")
        if other is None:
            yield "key-missing", f"it has no {what}_id"
        elif hashable(other) not in table:
            yield f"unknown-{what}", f"{what}_id {short(other)} is not among the {what} ids"
    if entry.get("bbox") is None:
        yield "key-missing", "it has no bbox"
    if box_of(entry) is not None:
        content = (*(hashable(entry.get(f"{what}_id")) for what in ("image", "category")), tuple(entry["bbox"]))
        if content in known.objects:
            yield "object-twice", f"class and box are those of annotation {known.objects[content]} too"
        known.objects.setdefault(content, entry.get("id"))


def _bounds(entry: Entry, known: Known) -> Found:
    box = box_of(entry)
    if box is None:
        if entry.get("bbox") is not None:
            yield "box-not-four-numbers", f"bbox is {short(entry['bbox'])}"
        return
    x, y, w, h = box
    size = known.size(entry)
    if not all(map(math.isfinite, box)):
        yield "box-not-finite", f"bbox is {short(entry['bbox'])}"
    elif w <= 0 or h <= 0:
        yield "box-without-area", f"its sides are {w} x {h}"
    elif size is not None:
        height, width = size
        inside = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
        out = max(-x, -y, x + w - width, y + h - height)
        where = f"{short(entry['bbox'])} in an image of {width}x{height}"
        if min(inside) <= 0:
            yield "box-outside", where
        elif min(inside) < MIN_SIDE:
            yield "box-too-thin", f"less than {MIN_SIDE} pixels: {where}"
        elif w > width + 0.5 or h > height + 0.5:
            yield "box-larger-than-image", where
        elif out > 0.5:
            yield "box-partly-outside", f"by {out:.1f} pixels: {where}"
    elif min(w, h) < MIN_SIDE:
        yield "box-too-thin", f"its sides are {w} x {h}, less than {MIN_SIDE} pixels"


def _area(entry: Entry, outline: Outline | None) -> Found:
    if "area" not in entry:
        return
    area, box = entry["area"], box_of(entry)
    if not is_number(area) or not math.isfinite(area) or area < 0:
        yield "area-invalid", f"area is {short(area)}"
    elif box is not None and all(map(math.isfinite, box)):
        right = [max(box[2], 0) * max(box[3], 0)] + ([] if outline is None else [outline[0]])
        if all(abs(area - one) > AREA_TOLERANCE * one + 4 for one in right):
            yield (
                "area-disagrees",
                f"area is {area}, but that of its box or mask {' or '.join(f'{a:.1f}' for a in right)}",
            )


def _crowd(entry: Entry) -> Found:
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        yield "iscrowd-invalid", f"iscrowd is {short(crowd)}"
    elif crowd and not isinstance(entry.get("segmentation"), dict):
        yield "crowd-without-rle", "COCO gives a crowd's outline as run lengths"


def _distance(entry: Entry, outline: Outline | None) -> Found:
    box = box_of(entry)
    if box is not None and outline is not None and _iou(box, outline[1]) < FAR:
        extent = ", ".join(f"{value:.1f}" for value in outline[1])
        yield "segmentation-far-from-box", f"it extends over [{extent}], the box is {short(entry['bbox'])}"


def _outline(given: Any, size: tuple[int, int] | None) -> tuple[Outline | None, list[tuple[str, str]]]:
    """The outline of a segmentation, if it is sound, and its defects."""
    if given is None:
        return None, []
    if given in ([], {}) or (isinstance(given, list) and not any(given)):
        return None, [("segmentation-empty", "for a mask it has its box")]
    if isinstance(given, list):
        defects = list(_polygons(given))
        return None if defects else _extent(given), defects
    if not isinstance(given, dict):
        return None, [("segmentation-invalid", f"{short(given)} is neither polygons nor run lengths")]
    defects = list(_runs(given, size))
    if not defects:
        try:
            runs = to_rle(given, *given["size"])
            return (float(rle.area(runs)), rle.toBbox(runs).tolist()), []
        except InputError as error:
            defects = [("rle-broken", str(error))]
    return None, defects


def _polygons(polygons: list[Any]) -> Found:
    for i, points in enumerate(polygons):
        if not isinstance(points, list) or not all(map(is_number, points)):
            yield "segmentation-invalid", f"polygon {i} is no list of numbers"
        elif len(points) % 2:
            yield "polygon-odd", f"polygon {i} has {len(points)} numbers"
        elif len(points) < 6:
            yield "polygon-short", f"polygon {i} has {len(points) // 2} points"
        elif not is_polygon(points):
            yield "polygon-not-finite", f"polygon {i} has a coordinate that is not finite or too large"


def _runs(runs: Entry, size: tuple[int, int] | None) -> Found:
    stated, counts = stated_size(runs), runs.get("counts")
    if stated is None:
        yield "rle-broken", f"its size is {short(runs.get('size'))}"
    elif not isinstance(counts, str) and not (
        isinstance(counts, list) and all(integer(run) is not None for run in counts)
    ):
        yield "rle-broken", f"its counts are {short(counts)}"
    elif size is not None and stated != size:
        yield "rle-of-another-size", f"its size is {stated[0]}x{stated[1]}, the image's {size[0]}x{size[1]} (h x w)"


def _extent(polygons: list[list[float]]) -> Outline:
    xs, ys = [x for points in polygons for x in points[::2]], [y for points in polygons for y in points[1::2]]
    return sum(map(_shoelace, polygons)), [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _shoelace(points: list[float]) -> float:
    xs, ys = points[::2], points[1::2]
    turns = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return abs(sum(x * v - u * y for x, y, u, v in turns)) / 2


def _iou(one: list[float], other: list[float]) -> float:
    """Of two boxes x, y, w, h, each with a pixel around it, since an outline may be a line."""
    (x, y, w, h), (u, v, a, b) = ([q[0] - 1, q[1] - 1, q[2] + 2, q[3] + 2] for q in (one, other))
    shared = max(0.0, min(x + w, u + a) - max(x, u)) * max(0.0, min(y + h, v + b) - max(y, v))
    return shared / max(w * h + a * b - shared, 1e-9)
