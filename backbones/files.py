"""Files that are whole or not there, and their hashes; no torch here."""

import contextlib
import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from backbones.errors import InputError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def list_images(folder: str | Path) -> list[Path]:
    """The image files anywhere below a folder, recognised by their suffixes and sorted; hidden ones are left out."""
    return sorted(path for path in Path(folder).rglob("*") if is_image(path.relative_to(folder)) and path.is_file())


def is_image(path: PurePath) -> bool:
    """Whether a path looks like that of an image file, and nothing in it is hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def check_writable(folder: str | Path) -> None:
    """Find out before the work, not after it, that results cannot be kept.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    with contextlib.suppress(_Kept), write_aside(Path(folder) / "probe"):
        raise _Kept


class _Kept(Exception):
    """Leaves `write_aside` without a file."""


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the named packages, to be kept beside a result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


@contextlib.contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place only if the block succeeds.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from None
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        with open(aside, "rb+") as file:  # on the disk before it has the name: a power cut leaves the old or the new
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~umask)  # mkstemp made it 0600
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove what processes that were killed while they wrote `path` left beside it; for its only writer to call."""
    path = Path(path)
    for aside in path.parent.glob(f".{path.stem}.????????{path.suffix}"):  # the names mkstemp gives
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, whole or not at all."""
    with write_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_json(path: str | Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file; `hook` may replace each object as soon as it is parsed.

    Raises:
        InputError: it is missing or no JSON.
    """
    try:
        return json.loads(Path(path).read_bytes(), object_hook=hook)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
