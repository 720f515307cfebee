"""Every defect of a COCO-format data set by the id of what has it: the checks of `python -m detection check-data`.

An error loses or falsifies objects, or stops training; a warning may be meant. No check stops the others.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from backbones.errors import InputError
from backbones.files import read_json
from backbones.preprocess import decode, upright_size
from detection.check_objects import check_annotation
from detection.findings import Entry, Finding, Found, Known, each, hashable, integer, pixels, short


def check_data(
    annotations: str | Path, images: str | Path | None = None, *, whole: bool = False
) -> tuple[list[Finding], Entry]:
    """All findings of an annotation file, and its content, empty where it is none.

    Args:
        images: the folder of the images, whose headers are then read.
        whole: decode the images too, which finds those that are cut off.

    Raises:
        InputError: no such file or folder.
    """
    if not Path(annotations).is_file():
        raise InputError(f"annotations {annotations} is no file")
    if images is not None and not Path(images).is_dir():
        raise InputError(f"images {images} is no folder")
    try:
        raw = read_json(annotations)
    except InputError as error:
        return [Finding("json-broken", "file", annotations, str(error))], {}
    if not isinstance(raw, dict):
        return [Finding("not-coco", "file", annotations, "its content is no object with lists of images and so on")], {}
    findings: list[Finding] = []
    content: Entry = {}
    for key in ("images", "categories", "annotations"):
        content[key] = raw.get(key)
        if not isinstance(content[key], list):
            findings.append(Finding("not-coco", "file", annotations, f"it has no list of {key}"))
            content[key] = []
    known = Known()
    findings += each("image", content["images"], known, _check_image)
    findings += each("category", content["categories"], known, _check_category)
    findings += each("annotation", content["annotations"], known, check_annotation)
    used = {hashable(entry.get("category_id")) for entry in content["annotations"] if isinstance(entry, dict)}
    for category_id, category in known.categories.items():
        if category_id not in used:
            message = f"no annotation is of {category.get('name')!r}"
            findings.append(Finding("category-without-objects", "category", category_id, message))
    if images is not None:
        findings += check_files(known.images, Path(images), whole)
    return findings, content


def _check_image(entry: Entry, where: Any, known: Known) -> Iterator[Finding]:
    key, name = entry.get("id"), entry.get("file_name")
    for kind, message in _id_defects("image", key, known.images):
        yield Finding(kind, "image", where, message)
    if not isinstance(name, str) or not name:
        yield Finding("image-without-file-name", "image", where, f"file_name is {short(name)}")
    elif name in known.file_names:
        yield Finding(
            "file-name-twice", "image", where, f"{name} is that of image {known.file_names[name]} too", integer(key)
        )
    else:
        known.file_names[name] = key
    size: list[Any] = [entry.get("width"), entry.get("height")]
    if None in size:
        yield Finding("image-without-size", "image", where, "width or height is missing", integer(key))
    elif None in map(pixels, size):
        yield Finding("image-size-invalid", "image", where, f"width, height are {short(size)}", integer(key))
    if isinstance(key, int):
        known.images.setdefault(key, entry)


def _check_category(entry: Entry, where: Any, known: Known) -> Iterator[Finding]:
    key, name = entry.get("id"), entry.get("name")
    for kind, message in _id_defects("category", key, known.categories):
        yield Finding(kind, "category", where, message)
    if name is None:
        yield Finding("category-without-name", "category", where, "it will be called by its id")
    elif str(name) in known.class_names:
        message = f"{str(name)!r} is the name of category {known.class_names[str(name)]} too"
        yield Finding("category-name-twice", "category", where, message)
    else:
        known.class_names[str(name)] = key
    if isinstance(key, int):
        known.categories.setdefault(key, entry)


def _id_defects(what: str, key: Any, known: Mapping[int, Entry]) -> Found:
    if integer(key) is None:
        yield f"{what}-id-invalid", "it has no id" if key is None else f"its id {short(key)} is no integer"
    elif key in known:
        yield f"{what}-id-twice", "an earlier one has the same id"


def check_files(images: Mapping[int, Entry], folder: Path, whole: bool) -> list[Finding]:
    """Findings about the image files, by their headers or, if `whole`, their pixels too."""

    def check(item: tuple[int, Entry]) -> list[Finding]:
        key, name = item[0], item[1].get("file_name")
        if not isinstance(name, str) or not name:
            return []
        return [Finding(kind, "image", key, message, key) for kind, message in _file(folder / name, item[1], whole)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of Python's lock
        return [finding for found in pool.map(check, images.items()) for finding in found]


def _file(path: Path, entry: Entry, whole: bool) -> Found:
    if not path.is_file():
        yield "file-missing", f"{path} is no file"
        return
    try:
        (height, width), orientation = upright_size(path)
        if whole:
            width, height = decode(path).size
    except InputError as error:
        yield "file-undecodable", str(error)
        return
    stated = entry.get("height"), entry.get("width")
    turned = f"EXIF orientation {orientation} is applied before boxes are used"
    if None not in stated and stated != (height, width):
        note = f"; {turned}" if orientation != 1 else ""
        yield "file-of-another-size", f"{path.name} is {width}x{height}, not {stated[1]}x{stated[0]}{note}"
    elif orientation != 1:
        yield "file-turned", f"{path.name}: {turned}: see that they are of the upright picture"
