"""Places that hold files: local paths, and URIs of pyarrow's file systems, whose paths are percent-encoded; no torch
here.
"""

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from backbones.errors import InputError

_URI = re.compile(r"[a-z][a-z0-9+.-]+://")
_OPTIONS = re.compile(r"\?\w+=[^/]*$")  # of a URI that is a glob, where another question mark is any character
FILE, FOLDER = fs.FileType.File, fs.FileType.Directory


def is_uri(where: str) -> bool:
    """Whether a place is none of this machine's paths."""
    return _URI.match(where) is not None


def suffix_of(where: str) -> str:
    """Of the file's name, in lower case; a URI's options are none of it."""
    return PurePosixPath(urlsplit(where).path if is_uri(where) else where).suffix.lower()


def parent(where: str) -> str:
    """The folder that a file is in."""
    if not is_uri(where):
        return os.path.dirname(where) or "."
    head, mark, query = where.partition("?")
    return f"{head.rpartition('/')[0]}{mark}{query}"


def join(folder: str, name: str) -> str:
    """A name in a folder; or the name itself, if it says where it is."""
    if is_uri(name) or name.startswith("/"):
        return name
    if not is_uri(folder):
        return os.path.join(folder, name)
    head, mark, query = folder.partition("?")
    return f"{head.rstrip('/')}/{quote(name)}{mark}{query}"


@lru_cache(maxsize=64)  # a connection each
def _connect(root: str) -> tuple[fs.FileSystem, str]:
    try:
        system, path = fs.FileSystem.from_uri(root)
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"cannot reach {root}: {reason_of(error)}") from None
    return system, path.rstrip("/")


def _system(where: str) -> tuple[fs.FileSystem, str]:
    if not is_uri(where):
        return fs.LocalFileSystem(), where
    parts = urlsplit(where)
    query = f"?{parts.query}" if parts.query else ""
    system, root = _connect(f"{parts.scheme}://{parts.netloc}/{query}")
    return system, f"{root}/{unquote(parts.path).lstrip('/')}".rstrip("/")


def open_file(where: str) -> Any:
    """To read bytes from any position."""
    if not is_uri(where):
        return open(where, "rb")
    system, path = _system(where)
    return system.open_input_file(path)


def kind_of(where: str) -> fs.FileType:
    """`FILE`, `FOLDER` or something else.

    Raises:
        InputError: a file system that cannot be reached.
    """
    if not is_uri(where):
        return FOLDER if os.path.isdir(where) else FILE if os.path.isfile(where) else fs.FileType.NotFound
    system, path = _system(where)
    try:
        return system.get_file_info(path).type
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot reach {where}: {reason_of(error)}") from None


def _children(where: str) -> list[tuple[str, bool]]:
    """Names in a folder, sorted, and whether each is a folder."""
    try:
        if not is_uri(where):
            with os.scandir(where) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries
                         if entry.is_file() or entry.is_dir(follow_symlinks=False)]  # fmt: skip
        else:
            system, path = _system(where)
            infos = system.get_file_info(fs.FileSelector(path))
            found = [(info.base_name, info.type == FOLDER) for info in infos]
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot list {where}: {reason_of(error)}") from None
    return sorted(found)


def walk(where: str, depth: int | None = None) -> Iterator[str]:
    """Names of files below a folder, sorted as paths are; hidden ones are left out."""
    for name, is_folder in _children(where):
        if name.startswith("."):
            continue
        if not is_folder:
            yield name
        elif depth is None or depth > 1:
            inner = walk(join(where, name), None if depth is None else depth - 1)
            yield from (f"{name}/{below}" for below in inner)


def split_glob(pattern: str) -> tuple[str, re.Pattern[str], int | None]:
    """The folder above a glob, what names below it have to match, and how deep they lie if that is bounded."""
    options = _OPTIONS.search(pattern) if is_uri(pattern) else None
    query = options.group() if options else ""
    parts = pattern.removesuffix(query).split("/")
    fixed = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
    rest = parts[fixed:]
    regex = "/".join(_translate(part) for part in rest).replace("(?:.*)/", "(?:.*/)?")
    head = "/".join(parts[:fixed]) or ("/" if fixed else ".")
    return head + query, re.compile(regex), None if "**" in rest else len(rest)


def _translate(part: str) -> str:
    if part == "**":
        return "(?:.*)"
    pieces = re.split(r"(\*|\?|\[[^\]]+\])", part)
    return "".join({"*": "[^/]*", "?": "[^/]"}.get(p, p.replace("[!", "[^") if p[:1] == "[" else re.escape(p))
                   for p in pieces)  # fmt: skip


def reason_of(error: BaseException) -> str:
    """What went wrong with a file, in one line."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else " ".join(str(error).split())
