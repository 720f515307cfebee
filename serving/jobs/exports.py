"""A job's results in one file for other tools, written a row at a time; no torch here.

.json     COCO's results, of detectors on images with ids: boxes x, y, width, height, and masks
.jsonl    an object an image, with the columns of the Parquet parts
.csv      a line a detection or, of a classifier, an image; one without a result has empty cells
.parquet  the parts as one
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from backbones.errors import InputError
from backbones.files import remove_leftovers, write_aside
from detection.coco_eval import to_results
from serving.artifact import Artifact, DetectorArtifact
from serving.jobs.results import Row, iter_rows, parts_of, schema_of
from serving.predictor import Detections

HEADER = ("path", "image_id", "error", "label", "score")
BOX = ("x1", "y1", "x2", "y2")


def check_export(path: str, artifact: Artifact, has_ids: bool) -> None:
    """That results can be written in the format of a suffix.

    Raises:
        InputError: COCO's results, of no detector or of images without ids.
    """
    if Path(path).suffix == ".json" and not (isinstance(artifact, DetectorArtifact) and has_ids):
        raise InputError(
            f"results={path}: COCO's results are of detectors, on images with ids (give COCO annotations or a manifest "
            "with image_id as input); for others write .jsonl, .csv or .parquet"
        )


def write_export(folder: Path, path: str, artifact: Artifact) -> None:
    """Write the rows of a model's folder in the format of the path's suffix, whole or not at all."""
    suffix = Path(path).suffix
    remove_leftovers(path)
    with write_aside(path) as aside:
        if suffix == ".parquet":
            with pq.ParquetWriter(aside, schema_of(artifact)) as writer:
                for part in parts_of(folder):
                    writer.write_table(pq.read_table(part))
            return
        with open(aside, "w", newline="", encoding="utf-8") as file:
            if suffix == ".csv":
                rows = csv.writer(file, lineterminator="\n")
                rows.writerow(HEADER + (BOX if isinstance(artifact, DetectorArtifact) else ()))
                rows.writerows(_csv_rows(iter_rows(folder), artifact))
            elif suffix == ".jsonl":
                for part in parts_of(folder):
                    file.writelines(f"{json.dumps(row)}\n" for row in pq.read_table(part).to_pylist())
            else:
                assert isinstance(artifact, DetectorArtifact)
                lines = map(json.dumps, coco_rows(iter_rows(folder), artifact))
                file.write("[" + next(lines, ""))
                file.writelines(f",\n{line}" for line in lines)
                file.write("]\n")


def coco_rows(rows: Iterable[Row], artifact: DetectorArtifact) -> Iterator[dict[str, Any]]:
    """Detections in COCO's results format; images with an error have none."""
    for row in rows:
        if row.result is not None:
            assert isinstance(row.result, Detections) and row.image_id is not None
            categories = [artifact.category_ids[i] for i in row.result.indices]
            masks = None if row.result.masks is None else list(row.result.masks)
            yield from to_results(row.image_id, row.result.boxes, row.result.scores, categories, masks)


def _csv_rows(rows: Iterable[Row], artifact: Artifact) -> Iterator[list[Any]]:
    for row in rows:
        head = [row.path, row.image_id, row.error]
        if row.result is None:
            yield head
        elif isinstance(row.result, Detections):
            found = zip(row.result.indices, row.result.scores.tolist(), row.result.boxes.tolist(), strict=True)
            lines = [[*head, artifact.classes[index], score, *box] for index, score, box in found]
            yield from lines or [head]
        else:
            yield [*head, artifact.classes[row.result.indices[0]], row.result.probabilities.tolist()[0]]
