"""One number: a data set through checkpoint, artefact, INT8 artefact, endpoint and batch job, side by side.

The command fails when two places that must agree do not, and says at which stage they part.
"""

import json
import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from backbones.cspnet import get_variant
from backbones.errors import InputError
from backbones.files import check_writable, write_aside, write_json
from backbones.published import protocol
from backbones.weights import read_metadata, resolve
from serving.agreement import Agreement, Bond, parting
from serving.artifact import Artifact
from serving.batch import run_batch
from serving.checkpoint import CheckpointSource
from serving.config import ServedModel, ServingConfig
from serving.evaluate import BATCH_SIZE, ArtifactSource, EndpointSource, ResultsSource, Source, run_eval
from serving.export import run_export
from serving.quantize import run_quantize
from serving.quickstart import Disagreement
from serving.results import Row, read_results, to_table
from serving.serve import start

METRICS = {"classification": "top1", "detection": "AP50"}
NEARLY = 1e-4  # that a metric may differ where rounding does
POLL_S = 0.2
HEADER = ("measured on", "metric", "logits", "scores", "boxes px", "unmatched", "images/s", "peak MiB")


@dataclass
class Place:
    """One place's answers to the data set and what they took.

    Attributes:
        metric: top-1 or AP50, in [0, 1].
        images_per_s: from the first image to the last answer, decoding included, after the start.
        peak_bytes: resident, of its largest process; None where the system does not tell.
    """

    name: str
    metric: float
    rows: list[Row]
    images_per_s: float
    peak_bytes: int | None
    against: str = ""
    agreement: Agreement | None = None
    parts_at: str | None = None

    def figures(self) -> dict[str, Any]:
        """What is stored of it."""
        found = {"metric": self.metric, "images_per_s": self.images_per_s, "peak_bytes": self.peak_bytes}
        if self.agreement is None:
            return found
        agreement = self.agreement
        return found | {
            "against": self.against, "must_be": agreement.bond, "agrees": self.parts_at is None,
            "parts_at": self.parts_at, "largest_differences": agreement.largest, "detections": agreement.detections,
            "unmatched": agreement.unmatched,
        }  # fmt: skip

    def line(self) -> tuple[str, ...]:
        """Its row of the table."""
        largest = self.agreement.largest if self.agreement else {}
        unmatched = str(self.agreement.unmatched) if self.agreement and "boxes" in largest else "-"
        differences = (f"{largest[name]:.1e}" if name in largest else "-" for name in ("logits", "scores", "boxes"))
        peak = "-" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.0f}"
        return (self.name, f"{self.metric:.4f}", *differences, unmatched, f"{self.images_per_s:.1f}", peak)
