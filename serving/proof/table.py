"""The table of a proof: what each place gave, and how far it is from the one that it is held against."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.artifact import Artifact
from serving.evaluate import Source
from serving.proof.agreement import Agreement, Bond, parting
from serving.proof.measure import Measured
from serving.sessions.providers import Provider

NEARLY = 1e-4  # that the metric may differ where answers are near
DIFFERENCES = ("logits", "scores", "boxes")
HEADER = ("measured on", "metric", *DIFFERENCES, "unmatched", "images/s", "peak MiB")


@dataclass
class Proof:
    """The table as it grows.

    Attributes:
        provider: of the artefact, the endpoint and the batch job.
    """

    metadata: Artifact
    provider: Provider
    folder: Path
    places: dict[str, Measured] = field(default_factory=dict)
    agreements: dict[str, tuple[str, Agreement]] = field(default_factory=dict)  # by place: with which, and how far
    problems: list[str] = field(default_factory=list)

    def compare(
        self,
        name: str,
        measured: Measured,
        against: str,
        bond: Bond,
        expected: Callable[[], Source],
        found: Callable[[], Source],
    ) -> None:
        """A place and the one that it is held against.

        Args:
            expected, found: open the place held against and this one again, to find out where they part.
        """
        self.places[name] = measured
        artifact = self.metadata if bond != "free" else self.metadata.model_copy(update={"precision": "int8"})
        agreement, reference = Agreement(artifact, bond), self.places[against]
        for one, other in zip(reference.rows, measured.rows, strict=True):
            agreement.add(one, other)
        self.agreements[name] = against, agreement
        if (culprit := agreement.culprit) is not None:
            stage = parting(expected(), found(), Path(culprit), bond, self.folder / "parted")
            self.problems.append(f"{name} and {against} part at {stage}, the most on {culprit}")
        elif bond != "free" and abs(measured.metric - reference.metric) > (NEARLY if bond == "near" else 0):
            self.problems.append(f"{name} has {measured.metric:.6f} and {against} {reference.metric:.6f}")

    def lines(self) -> list[tuple[str, ...]]:
        """The table's rows."""
        found = []
        for name, place in self.places.items():
            agreement = self.agreements[name][1] if name in self.agreements else Agreement(self.metadata, "free")
            off = [f"{agreement.largest[key]:.1e}" if key in agreement.largest else "-" for key in DIFFERENCES]
            alone = str(agreement.unmatched) if agreement.detections else "-"
            peak = "-" if place.peak_bytes is None else f"{place.peak_bytes / 2**20:.0f}"
            speed = f"{len(place.rows) / place.seconds:.1f}"
            found.append((name, f"{place.metric:.4f}", *off, alone, speed, peak))
        return found

    def figures(self) -> dict[str, Any]:
        """What is stored."""
        places: dict[str, Any] = {}
        for name, place in self.places.items():
            places[name] = {
                "metric": place.metric, "images_per_s": len(place.rows) / place.seconds, "peak_bytes": place.peak_bytes
            }  # fmt: skip
            if name in self.agreements:
                against, agreement = self.agreements[name]
                places[name] |= {
                    "against": against, "bond": agreement.bond, "agrees": agreement.holds,
                    "largest": agreement.largest, "detections": agreement.detections, "unmatched": agreement.unmatched,
                }  # fmt: skip
        return {"provider": self.provider, "places": places, "problems": self.problems}
