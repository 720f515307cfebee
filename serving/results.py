"""What a batch job writes: one Parquet file, a row an image, with what the artefact says about itself; no torch here.

`read_results` gives back, to the bit, what the predictor gave: of a classification the best `TOP_K`, of masks their run
lengths.
"""

from collections.abc import Iterable
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

SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # below the input folder; else as it was given
        pa.field("status", pa.string(), nullable=False),  # "ok" or "error"
        ("error", pa.string()),
        ("height", pa.int32()),  # height and width of the upright original: detections only
        ("width", pa.int32()),
        ("labels", pa.list_(pa.string())),
        ("indices", pa.list_(pa.int64())),  # into the artefact's classes
        ("scores", pa.list_(pa.float32())),
        ("boxes", pa.list_(pa.list_(pa.float32()))),  # [K, 4] x1, y1, x2, y2 in the original: detections only
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

    @property
    def status(self) -> str:
        return "ok" if self.error is None else "error"


def schema_of(artifact: Artifact) -> pa.Schema:
    """The results' columns, with what the artefact says about itself."""
    masks = isinstance(artifact, DetectorArtifact) and artifact.masks
    return (SCHEMA.append(SEGMENTATIONS) if masks else SCHEMA).with_metadata(to_metadata(artifact))


def to_table(rows: Iterable[Row], artifact: Artifact) -> pa.Table:
    """Rows as a table of `schema_of`; floats are exact."""
    return pa.Table.from_pylist([_record(row, artifact) for row in rows], schema=schema_of(artifact))


def _record(row: Row, artifact: Artifact) -> dict[str, Any]:
    record: dict[str, Any] = {"path": row.path, "status": row.status, "error": row.error}
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


def read_results(path: str | Path) -> tuple[Artifact, list[Row]]:
    """What `run_batch` wrote: what the artefact says about itself, and a row an image.

    Raises:
        InputError: no such file, or none that `run_batch` wrote.
    """
    if not Path(path).is_file():
        raise InputError(f"no results at {path}: make them with `python -m serving batch`")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is no Parquet file ({reason}): make it with `python -m serving batch`") from None
    said = (table.schema.metadata or {}).get(KEY.encode())
    artifact = from_metadata({KEY: said.decode(errors="replace")}, path) if said is not None else None
    if artifact is None or not table.schema.equals(schema_of(artifact)):
        raise InputError(f"{path} holds no results of this project: make it with `python -m serving batch`")
    return artifact, [_row(record) for record in table.to_pylist()]


def _row(record: dict[str, Any]) -> Row:
    if record["status"] == "error":
        return Row(record["path"], None, record["error"])
    indices = np.array(record["indices"], dtype=np.int64)
    scores = np.array(record["scores"], dtype=np.float32)
    if record["boxes"] is None:
        return Row(record["path"], Classification(indices, scores))
    boxes = np.array(record["boxes"], dtype=np.float32).reshape(-1, 4)
    size = (record["height"], record["width"])
    return Row(record["path"], Detections(boxes, scores, indices, size, record.get("segmentations")))
