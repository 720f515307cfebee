"""What a batch job writes: Parquet, a row an image, with what the artefact says about itself; no torch here.

`read_results` gives back, to the bit, what the predictor gave: of a classification the best `TOP_K`, of masks their run
lengths.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from backbones.errors import InputError
from serving.artifact import KEY, Artifact, DetectorArtifact, from_metadata, to_metadata
from serving.predictor import Classification, Detections

TOP_K = 5  # classes that a classifier's row keeps
PICTURE = "picture"  # a column of annotated images on the way to files of their own, which no part keeps

SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # below the input folder; else as it was given
        ("image_id", pa.int64()),  # COCO's, if the input has them
        pa.field("status", pa.string(), nullable=False),  # "ok" or "error"
        ("error", pa.string()),
        ("height", pa.int32()),  # height and width of the upright original: detections only
        ("width", pa.int32()),
        ("labels", pa.list_(pa.string())),
        ("indices", pa.list_(pa.int64())),  # into the artefact's classes
        ("scores", pa.list_(pa.float32())),
        ("boxes", pa.list_(pa.list_(pa.float32()))),  # [K, 4] x1, y1, x2, y2 in the original: detections only
        ("decode_ms", pa.float32()),  # to read, decode and resize it, for all of the job's models
        ("run_ms", pa.float32()),  # of its batch, shared equally
        ("artifact_sha256", pa.string()),
    ]
)
# COCO's compressed run lengths in the original's size: of models that find masks only
SEGMENTATIONS = pa.field(
    "segmentations",
    pa.list_(pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),  # pycocotools' keys
)


@dataclass(frozen=True)
class Row:
    """What became of one image: a result, or the error in its place. A classification holds the best `TOP_K`."""

    path: str
    result: Classification | Detections | None
    error: str | None = None
    image_id: int | None = None
    decode_ms: float | None = None
    run_ms: float | None = None

    @property
    def status(self) -> str:
        return "ok" if self.error is None else "error"


def schema_of(artifact: Artifact) -> pa.Schema:
    """The results' columns, with what the artefact says about itself."""
    masks = isinstance(artifact, DetectorArtifact) and artifact.masks
    return (SCHEMA.append(SEGMENTATIONS) if masks else SCHEMA).with_metadata(to_metadata(artifact))


def to_table(rows: Iterable[Row], artifact: Artifact, sha256: str | None = None) -> pa.Table:
    """Rows as a table of `schema_of`; floats are exact. `sha256` is the artefact's file's."""
    records = [_record(row, artifact) | {"artifact_sha256": sha256} for row in rows]
    return pa.Table.from_pylist(records, schema=schema_of(artifact))


def _record(row: Row, artifact: Artifact) -> dict[str, Any]:
    record: dict[str, Any] = {
        "path": row.path, "image_id": row.image_id, "status": row.status, "error": row.error,
        "decode_ms": row.decode_ms, "run_ms": row.run_ms,
    }  # fmt: skip
    if row.result is None:
        return record
    if isinstance(row.result, Detections):
        indices, scores = row.result.indices, row.result.scores
        record |= {"height": row.result.size[0], "width": row.result.size[1], "boxes": row.result.boxes.tolist()}
        if row.result.masks is not None:
            record["segmentations"] = list(row.result.masks)
    else:
        indices, scores = row.result.indices[:TOP_K], row.result.probabilities[:TOP_K]
    labels = [artifact.classes[i] for i in indices]
    return record | {"labels": labels, "indices": indices.tolist(), "scores": scores.tolist()}


def part_name(number: int) -> str:
    """The file name of a job's part, from 0."""
    return f"part-{number:06d}.parquet"


def parts_of(path: str | Path) -> list[Path]:
    """The files of results, in their order: those of a model's folder, or the one file.

    Raises:
        InputError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    parts = sorted(path.glob("part-*.parquet"))
    if not parts:
        below = sorted({found.parent.name for found in path.glob("*/part-*.parquet")})
        remedy = (
            f"name a model's folder in it, {' or '.join(below)}"
            if below
            else "make them with `python -m serving batch`"
        )
        raise InputError(f"no results at {path}: {remedy}")
    return parts


def read_artifact_of(path: Path) -> Artifact:
    """What the artefact behind a file of results says about itself.

    Raises:
        InputError: it is none that a job wrote.
    """
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is no Parquet file ({reason}): make it with `python -m serving batch`") from None
    said = (schema.metadata or {}).get(KEY.encode())
    artifact = from_metadata({KEY: said.decode(errors="replace")}, path) if said is not None else None
    if artifact is None or not schema.equals(schema_of(artifact)):
        raise InputError(f"{path} holds no results of this project: make it with `python -m serving batch`")
    return artifact


def iter_rows(path: str | Path) -> Iterator[Row]:
    """The rows of results in the input's order, a row group in memory at a time."""
    for part in parts_of(path):
        with pq.ParquetFile(part) as file:
            for group in range(file.num_row_groups):
                yield from map(to_row, file.read_row_group(group).to_pylist())


def read_results(path: str | Path) -> tuple[Artifact, list[Row]]:
    """What `run_batch` wrote, as a model's folder or one file: what the artefact says about itself, and a row an image.

    Raises:
        InputError: no such file, or none that `run_batch` wrote.
    """
    artifacts = [read_artifact_of(part) for part in parts_of(path)]
    return artifacts[0], list(iter_rows(path))


def to_row(record: dict[str, Any]) -> Row:
    """A row of a table, as `to_table` took it."""
    known = {name: record[name] for name in ("image_id", "decode_ms", "run_ms")}
    if record["status"] == "error":
        return Row(record["path"], None, record["error"], **known)
    indices = np.array(record["indices"], dtype=np.int64)
    scores = np.array(record["scores"], dtype=np.float32)
    if record["boxes"] is None:
        return Row(record["path"], Classification(indices, scores), **known)
    boxes = np.array(record["boxes"], dtype=np.float32).reshape(-1, 4)
    size = (record["height"], record["width"])
    return Row(record["path"], Detections(boxes, scores, indices, size, record.get("segmentations")), **known)
