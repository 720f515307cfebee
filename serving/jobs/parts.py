"""The output folder of a batch job: which job it is of, and which parts are there; no torch here.

    job.json                       what the job is of: a start on other images or artefacts is refused
    inputs.parquet                 its images, in order
    <model>/part-000000.parquet    rows of the first `part_rows` images, and so on
    <model>/annotated/000000000.jpg
    summary.json, index.html, histograms.png, contact_sheet.jpg

A part gets its name when it is whole and on the disk. So the parts themselves are the record of progress: a job that
starts again goes on after the last one that every model has. Part n always holds the same images.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from backbones.errors import InputError
from backbones.files import read_json, remove_leftovers, write_aside, write_json
from serving.jobs.inputs import File
from serving.jobs.places import reason_of
from serving.jobs.results import PICTURE, part_name

JOB, INPUTS = "job.json", "inputs.parquet"
LISTED = ".inputs.parquet"  # until the job is known to be the same
GROUP = 4096  # images of the list that are held at once
_LIST = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("source", pa.binary(), nullable=False),
        ("place", pa.list_(pa.int64())),
        ("image_id", pa.int64()),
        ("label", pa.string()),
    ]
)


@contextlib.contextmanager
def room_on_disk(folder: object) -> Iterator[None]:
    """Tell a disk that is full, or gone, in one line."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        kept = "what is finished is kept: mend that, and start the job again"
        raise InputError(f"cannot write below {folder}: {reason_of(error)}; {kept}") from None


class Output:
    """A job's folder, which one process at a time writes to.

    Args:
        models: their names.
        rows: of each part.
    """

    def __init__(self, folder: Path, models: Sequence[str], rows: int):
        self.folder, self.rows = folder, rows
        self.models = [folder / name for name in models]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others out; the lock ends with this process, however it ends.

        Raises:
            InputError: another job writes here, or the folder cannot be made or is not a job's.
        """
        try:
            if self.folder.is_file():
                raise InputError(f"output {self.folder} is a file: name a folder for the job's parts")
            if self.folder.is_dir() and not (self.folder / JOB).exists():
                strange = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
                if strange:
                    raise InputError(
                        f"output {self.folder} holds other files, such as {min(strange)}: name a new folder"
                    )
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - it is closed below
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror}; choose another place") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another job writes to {self.folder}: wait for its end, or name another") from None
            try:
                yield
            finally:
                (self.folder / LISTED).unlink(missing_ok=True)
                if not (self.folder / JOB).exists():  # nothing came of it
                    (self.folder / ".lock").unlink()
                    with contextlib.suppress(OSError):
                        self.folder.rmdir()

    def claim(self, job: dict[str, Any]) -> None:
        """Say what the folder is of, or find out that it is of the same, and keep the list of images.

        Raises:
            InputError: it holds another job's results.
        """
        path = self.folder / JOB
        if path.exists():
            before = read_json(path)
            for key in before | job:
                if json.dumps(before.get(key)) != json.dumps(job.get(key)):
                    raise InputError(
                        f"{self.folder} holds results of another {key}, {short(before.get(key))} and not "
                        f"{short(job.get(key))}: name another output, or remove this one"
                    )
        (self.folder / LISTED).replace(self.folder / INPUTS)
        for name in (LISTED, JOB, "summary.json", "index.html"):
            remove_leftovers(self.folder / name)
        for model in self.models:
            for leftover in model.glob(".part-*"):  # of a process that was killed while it wrote
                leftover.unlink()
        write_json(path, job)

    def part(self, model: Path, number: int) -> Path:
        return model / part_name(number)

    def parts_done(self) -> int:
        """How many parts every model has, from the first on."""
        number = 0
        while all(self.part(model, number).exists() for model in self.models):
            number += 1
        return number

    def errors_in(self, number: int) -> int:
        """Images of a part that some model has an error for."""
        status = [pq.read_table(self.part(model, number), columns=["status"])["status"] for model in self.models]
        return sum("error" in row for row in zip(*(column.to_pylist() for column in status), strict=True))

    def write(self, number: int, tables: Sequence[pa.Table]) -> None:
        """A part of each model, whole or not at all.

        Raises:
            InputError: the disk is full.
        """
        for model, table in zip(self.models, tables, strict=True):
            with room_on_disk(self.folder):
                if PICTURE in table.column_names:
                    self._write_pictures(model / "annotated", number * self.rows, table[PICTURE])
                    table = table.drop_columns([PICTURE])
                with write_aside(self.part(model, number)) as aside:
                    pq.write_table(table, aside)

    def _write_pictures(self, folder: Path, first: int, pictures: pa.ChunkedArray) -> None:
        for i, picture in enumerate(pictures, start=first):
            if picture.is_valid:
                with write_aside(folder / f"{i:09d}.jpg") as aside:
                    aside.write_bytes(picture.as_py())


def short(value: object) -> str:
    """A value of job.json for a message: hashes cut to what tells them apart."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


@dataclass(frozen=True)
class Listing:
    """What was listed: how many images, the SHA-256 of all that is known of them, and their labels."""

    images: int
    sha256: str
    labels: frozenset[str]
    has_ids: bool


def write_list(files: Iterable[File], path: Path) -> Listing:
    """Write the list as Parquet, whole or not at all."""
    digest, images, labels, has_ids = hashlib.sha256(), 0, set(), True
    files = iter(files)
    with write_aside(path) as aside, pq.ParquetWriter(aside, _LIST) as writer:
        while some := list(itertools.islice(files, GROUP)):
            for file in some:
                digest.update(f"{astuple(file)!r}\n".encode())
                has_ids = has_ids and file.image_id is not None
                if file.label is not None:
                    labels.add(file.label)
            images += len(some)
            writer.write_table(pa.Table.from_pylist([vars(file) for file in some], schema=_LIST))
    return Listing(images, digest.hexdigest(), frozenset(labels), has_ids)


def read_list(path: str | Path, start: int = 0) -> Iterator[File]:
    """The images of a written list, from one on."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start < rows:
                for row in file.read_row_group(group).to_pylist()[start:]:
                    place = None if row["place"] is None else tuple(row["place"])
                    yield File(row["name"], row["source"], place, row["image_id"], row["label"])
            start = max(0, start - rows)
