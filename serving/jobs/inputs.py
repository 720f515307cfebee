"""The images of a batch job: found one by one, and read; no torch here.

    a folder                images anywhere below it, by suffix, sorted; hidden ones are left out
    a glob                  `**` is any folders: images/**/*.jpg, shards/*.tar, rows/*.parquet
    .txt                    a path a line
    .csv, .jsonl, .parquet  a column `path`, or of Parquet `bytes`; `label` and `image_id` if there are any
    .json                   COCO's annotations: results carry the images' ids
    .tar                    an archive that is not compressed, or WebDataset's shard, whose .cls are labels
    an image

Each is a local path or a URI of pyarrow's file systems (s3://, gs://, hdfs://, file://), as are the paths in a
manifest. What is listed is never held in memory as a whole: of a folder its own names, of COCO's file all of it.
"""

import csv
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from backbones.errors import InputError
from backbones.files import IMAGE_SUFFIXES, is_image
from backbones.preprocess import ImageError
from detection.coco import load_annotations
from serving.jobs.places import (
    FILE,
    FOLDER,
    is_uri,
    join,
    kind_of,
    open_file,
    parent,
    reason_of,
    split_glob,
    suffix_of,
    walk,
)

MANIFESTS = (".txt", ".csv", ".jsonl", ".parquet", ".json")


@dataclass(frozen=True)
class File:
    """An image to read.

    Attributes:
        name: what results call it.
        source: the path as the operating system has it, which need not be UTF-8, or a URI.
        place: in a tar archive offset and size of its bytes; in a Parquet file row group, and row in it.
        image_id: COCO's.
        label: the name of its class, if the input says it.
    """

    name: str
    source: bytes
    place: tuple[int, int] | None = None
    image_id: int | None = None
    label: str | None = None

    def read(self) -> bytes | str:
        """Its bytes, or its path if it is a local file of its own.

        Raises:
            ImageError: it cannot be read.
        """
        where = os.fsdecode(self.source)
        if self.place is None and not is_uri(where):
            return where
        try:
            if self.place is None:
                with open_file(where) as file:
                    return bytes(file.read())
            if suffix_of(where) == ".parquet":
                group, row = self.place
                content = _row_group(where, group)[row].as_py()
            else:
                offset, size = self.place
                with open_file(where) as file:
                    file.seek(offset)
                    content = bytes(file.read(size))
                if len(content) < size:
                    raise ImageError(f"{where} ends in the middle of {self.name}: fetch the archive again")
        except (OSError, pa.ArrowException) as error:
            raise ImageError(f"{self.name} cannot be read: {reason_of(error)}") from None
        if content is None:
            raise ImageError(f"{self.name} holds no bytes: embed the image")
        return bytes(content)


def text_of(name: str) -> str:
    """A file name without the surrogates that stand for bytes that are no UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def list_files(source: str, images: str | None = None, folders_are_labels: bool = False) -> Iterator[File]:
    """The images of an input, as they are found.

    Args:
        images: the folder of a manifest's or of COCO's names.

    Raises:
        InputError: nothing there, or nothing of the above.
    """
    files = _found(source, images)
    first = next(files, None)
    if first is None:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise InputError(f"no images ({kinds}) in {source}: is it the right folder, or an empty list?")
    for file in itertools.chain([first], files):
        if not folders_are_labels:
            yield file
        elif "/" not in file.name.strip("/"):
            raise InputError(f"{file.name} is in no class folder: give the folder above as input, or leave out labels")
        else:
            yield File(file.name, file.source, file.place, file.image_id, file.name.strip("/").split("/")[0])


def _found(source: str, images: str | None) -> Iterator[File]:
    kind = kind_of(source)
    if kind == FOLDER:
        for name in walk(source):
            if is_image(PurePosixPath(name)):
                yield _file(name, source)
    elif kind == FILE:
        yield from _of_one(source, images, source)
    elif re.search(r"[*?\[]", source):
        head, pattern, depth = split_glob(source)
        for name in walk(head, depth) if kind_of(head) == FOLDER else ():
            if pattern.fullmatch(name) and PurePosixPath(name).suffix.lower() in (*IMAGE_SUFFIXES, ".tar", ".parquet"):
                yield from _of_one(join(head, name), images, name)
    else:
        raise InputError(
            f"no input at {source}: give a folder of images, a glob, a list of paths ({', '.join(MANIFESTS)}), a .tar "
            "file or an image"
        )


def _of_one(where: str, images: str | None, name: str) -> Iterator[File]:
    """What one file stands for."""
    suffix = suffix_of(where)
    folder = images or parent(where)
    if suffix in IMAGE_SUFFIXES:
        yield _file(name, "", where)
    elif suffix == ".tar":
        yield from _members(where)
    elif suffix == ".parquet":
        yield from _parquet_rows(where, folder)
    elif suffix == ".json":
        if is_uri(where):
            raise InputError(f"{where} is read by other tools, which need a local file: copy it here, and give images=")
        for image in load_annotations(where)["images"]:
            yield _file(image["file_name"], folder, image_id=image["id"])
    elif suffix in MANIFESTS:
        for number, row in _lines(where, suffix):
            yield _from_row(row, folder, f"{where}, line {number}")
    else:
        raise InputError(
            f"{where} is no image ({', '.join(IMAGE_SUFFIXES)}), no list of paths ({', '.join(MANIFESTS)}) and no .tar "
            "archive: give one of these"
        )


def _lines(where: str, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a manifest with their line numbers."""
    try:
        with open_file(where) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            if suffix == ".txt":
                rows: Iterable[Any] = ({"path": line.strip()} for line in text)
            elif suffix == ".csv":
                rows = csv.DictReader(text)
                _need(where, rows.fieldnames or (), ("path",))
            else:
                rows = (json.loads(line) if line.strip() else {"path": ""} for line in text)
            for number, row in enumerate(rows, start=2 if suffix == ".csv" else 1):
                if not isinstance(row, dict):
                    raise InputError(f'{where}, line {number} is no JSON object: write {{"path": …}}')
                if suffix == ".jsonl":
                    _need(f"{where}, line {number}", row, ("path",))
                if row["path"] != "":
                    yield number, row
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"cannot read {where} ({reason_of(error)}): give a text file in UTF-8 of {suffix[1:]}"
        ) from None


def _need(where: str, columns: Iterable[str], any_of: Sequence[str]) -> None:
    if not set(any_of) & set(columns):
        has = ", ".join(columns) or "none"
        raise InputError(f"{where} has no column {' or '.join(any_of)} but {has}: rename one of them")


def _from_row(row: dict[str, Any], folder: str, where: str) -> File:
    path, label, image_id = row["path"], row.get("label"), row.get("image_id")
    if not isinstance(path, str):
        raise InputError(f"{where}: path={path!r} is no text: give each row its path")
    return _file(path, folder, image_id=_whole(image_id, where), label=None if label in (None, "") else str(label))


def _whole(value: Any, where: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: image_id={value!r} is no whole number") from None


def _parquet_rows(where: str, folder: str) -> Iterator[File]:
    try:
        with open_file(where) as raw, pq.ParquetFile(raw) as file:
            has = file.schema_arrow.names
            _need(where, has, ("path", "bytes"))
            columns = [name for name in ("path", "label", "image_id") if name in has]
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=columns).to_pylist() or []
                for i in range(file.metadata.row_group(group).num_rows):
                    row = rows[i] if columns else {}
                    place = f"{where}, row {i} of group {group}"
                    if "bytes" not in has:
                        yield _from_row(row, folder, place)
                    else:
                        name = row.get("path") or f"{PurePosixPath(where).name}[{group},{i}]"
                        made = _from_row(row | {"path": name}, folder, place)
                        yield File(made.name, _source(where), (group, i), made.image_id, made.label)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {where} ({reason_of(error)}): give a Parquet file") from None


@lru_cache(maxsize=4)  # images that follow each other lie in one group
def _row_group(where: str, group: int) -> pa.ChunkedArray:
    with open_file(where) as raw, pq.ParquetFile(raw) as file:
        return file.read_row_group(group, columns=["bytes"])["bytes"]


def _members(where: str) -> Iterator[File]:
    """The images of an archive; of a WebDataset sample, whose files follow each other, each with its .cls."""
    try:
        with open_file(where) as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for _, sample in itertools.groupby(_infos(tar), key=lambda info: _key(info.name)):
                infos = list(sample)
                labels = [tar.extractfile(info) for info in infos if info.name.endswith(".cls")]
                label = labels[0].read().decode().strip() if labels and labels[0] else None
                for info in infos:
                    if is_image(PurePosixPath(info.name)):
                        name = f"{PurePosixPath(where).name}/{info.name}"
                        yield File(text_of(name), _source(where), (info.offset_data, info.size), None, label)
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is no uncompressed tar archive ({error}): decompress or unpack it") from None
    except OSError as error:
        raise InputError(f"cannot read {where}: {reason_of(error)}") from None


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for info in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep what is known of every file
        if info.isreg():
            yield info


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _file(name: str, folder: str, where: str | None = None, **known: Any) -> File:
    return File(text_of(name), _source(join(folder, name) if where is None else where), None, **known)


def _source(where: str) -> bytes:
    return where.encode() if is_uri(where) else os.fsencode(os.path.abspath(where))
