"""Graphs that a runtime optimised, kept so that only an artefact's first start pays for it; no torch here.

An entry is named `<CPU>-<runtime>-<its version>-<artefact's SHA-256>.<checksum>`: optimised graphs hold the weights in
blocks as wide as this CPU's vectors, and on another they would be wrong. The name says what is in the file, so that one
rename makes an entry, whoever else makes the same.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from backbones.errors import InputError

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_WORK = ".new-"  # the folder of an entry that is being written
_ABANDONED_S = 3600


def load_or_make(artefact: Path, key: str, load: Callable[[Path], T], make: Callable[[Path | None], T]) -> T:
    """What `load` gives from an artefact's entry; without a whole one, what `make` gives, which also writes the entry.

    Args:
        load: raises InputError at an entry that it cannot use.
        make: writes to the path that it is given; to none if there is no place for a cache.
    """
    folders = cache_folders(artefact)
    if entry := _find(folders, key):
        try:
            return load(entry)
        except InputError as error:
            _LOG.warning("%s; the graph is optimised again", error)
            with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
                entry.unlink()
    if (folder := writable_folder(folders)) is None:
        return make(None)
    made: list[T] = []
    try:
        _write(folder, key, lambda aside: made.append(make(aside)))
    except (OSError, InputError) as error:
        result = made[0] if made else make(None)  # a graph that is none fails here, and says so by itself
        _LOG.warning("the optimised graph of %s is not kept (%s)", artefact, error)
        return result
    return made[0]


def cache_folders(artefact: Path) -> list[Path]:
    """Where an artefact's entries may lie, best first: in $CSPNET_CACHE if that is set, else beside the artefact and,
    if that cannot be written, in the user's cache. Whoever can write there can change what is run, as with the artefact
    itself. None for a hidden file, which is being written and will be renamed.
    """
    artefact = artefact.absolute()
    if artefact.name.startswith("."):
        return []
    own = f"{artefact.name}-{hashlib.sha256(os.fsencode(artefact)).hexdigest()[:8]}.cache"
    if chosen := os.environ.get("CSPNET_CACHE"):
        return [Path(chosen).expanduser() / own]
    folders = [artefact.with_name(f"{artefact.name}.cache")]
    with contextlib.suppress(RuntimeError):  # a user without a home, as in many containers
        folders.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cspnet" / own)
    return folders


def writable_folder(folders: list[Path]) -> Path | None:
    """The first of the folders that can be written, made if need be; None, and a line in the log, without one."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    if folders:
        _say_once(f"no cache of optimised graphs, for {folders[-1]} cannot be written: set CSPNET_CACHE to a folder")
    return None


@cache
def _say_once(line: str) -> None:
    _LOG.warning(line)


def entry_key(runtime: str, version: str, sha256: str) -> str:
    """What an entry has to be of: this CPU, the runtime's version and the artefact of that hash."""
    return f"{_cpu()}-{runtime}-{re.sub('[^0-9A-Za-z.]', '_', version)}-{sha256[:32]}"


def _find(folders: list[Path], key: str) -> Path | None:
    """A whole entry of that key; damaged ones are removed and counted in the log."""
    damaged = 0
    for path in (path for folder in folders for path in sorted(folder.glob(f"{key}.*"))):
        try:
            if path.name == _entry_name(key, path):
                return path
            damaged += 1
            path.unlink()
        except OSError as error:  # gone meanwhile, or not ours to remove
            _LOG.warning("%s: %s", path, error.strerror)
    if damaged:
        _LOG.warning("%d damaged in %s: the graph is optimised again", damaged, ", ".join(map(str, folders)))
    return None


def _write(folder: Path, key: str, write: Callable[[Path], object]) -> None:
    """Let `write` write an entry, and remove those that this CPU and runtime have of other artefacts and versions.

    Raises:
        OSError: the folder is full or gone.
    """
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=folder, ignore_cleanup_errors=True) as work:
        aside = Path(work) / "graph"
        write(aside)
        if not list(folder.glob(f"{key}.*")):  # else another process was faster
            aside.replace(folder / _entry_name(key, aside))
    cpu, runtime, _ = key.split("-", 2)
    for path in folder.glob(f"{cpu}-{runtime}-*"):
        if not path.name.startswith(f"{key}."):
            path.unlink(missing_ok=True)
    for path in folder.glob(f"{_WORK}*"):  # of processes that were killed
        with contextlib.suppress(OSError):  # gone meanwhile
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


def _entry_name(key: str, path: Path) -> str:
    checksum = 0  # against accidents; the artefact's own hash is no signature either
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return f"{key}.{checksum:08x}"


@cache
def _cpu() -> str:
    """This CPU's kind and instruction sets, as a short hash."""
    kinds = ("model name", "flags", "Features", "CPU part")  # of x86 and of ARM
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about = sorted({line for line in lines if line.startswith(kinds)})
    except OSError:
        about = [platform.processor()]
    return hashlib.sha256("\n".join([platform.machine(), *about]).encode()).hexdigest()[:12]
