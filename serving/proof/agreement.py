"""Whether two places give the same answers and, if they do not, the stage at which they part."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from backbones.errors import InputError
from backbones.preprocess import ClassifierPreprocess, classifier_resized, decode, detector_pixels, fitted_size
from serving.artifact import Artifact, DetectorArtifact
from serving.evaluate import Source
from serving.jobs.results import TOP_K, Row
from serving.parity import TOLERANCE, UNMATCHED, Match, Output, larger
from serving.predictor import Classification, Detections

Stage = Literal["decode", "resize", "graph", "post-processing"]
# Exact places give the same bits, near ones what rounding in float32 allows; a quantized artefact may answer otherwise.
Bond = Literal["exact", "near", "free"]


class Disagreement(InputError):
    """Two places that must give one number do not."""


@dataclass
class Agreement:
    """What two places' answers differ by, over the images of a data set.

    Attributes:
        artifact: what both places run.
        largest: differences by name. Of a classifier `logits`, as logarithms of the probabilities, which are the logits
            but for one constant an image, and `scores`, of the `TOP_K` best classes; of a detector `scores` and
            `boxes`, in pixels of the resized image, of detections that find each other.
        unmatched: detections that are on one side alone, among `detections`.
        worst: the image that differs most, and how much of what is allowed: over 1 is too much.
        loneliest: the image with the most unmatched detections, and how many.
    """

    artifact: Artifact
    bond: Bond
    images: int = 0
    detections: int = 0
    unmatched: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    worst: tuple[str, float] = ("", 0.0)
    loneliest: tuple[str, int] = ("", 0)

    def add(self, expected: Row, found: Row) -> None:
        """Compare an image's two answers."""
        self.images += 1
        excess = self._excess(expected, found)
        if excess > self.worst[1] or np.isnan(excess):  # NaN is worse than all, and stays
            self.worst = (expected.path, excess)

    @property
    def holds(self) -> bool:
        """Whether the answers are as near as the two places must be."""
        return self.culprit is None

    @property
    def culprit(self) -> str | None:
        """The image to look into, if the answers are not as near as they must be."""
        if self.bond == "free":
            return None
        if not self.worst[1] <= 1:
            return self.worst[0]
        return self.loneliest[0] if self.unmatched > UNMATCHED["fp32"] * self.detections else None

    def _excess(self, expected: Row, found: Row) -> float:
        one, other = expected.result, found.result
        if isinstance(one, Classification) and isinstance(other, Classification):
            differences, missing = _classes(one, other)
        elif isinstance(one, Detections) and isinstance(other, Detections):
            assert isinstance(self.artifact, DetectorArtifact)
            match = Match(self.artifact)
            sides = _in_resized(one, self.artifact), _in_resized(other, self.artifact)
            match.add(*sides)
            match.add(*reversed(sides))
            self.detections += match.detections
            self.unmatched += match.unmatched
            self.loneliest = max(self.loneliest, (expected.path, match.unmatched), key=lambda found: found[1])
            differences, missing = match.largest, False
        else:  # one has an error in its place
            return 0.0 if (one is None) == (other is None) else np.inf
        for name, value in differences.items():
            self.largest[name] = larger(self.largest.get(name, 0.0), value)
        if self.bond == "exact":
            return 0.0 if _same_bits(one, other) else np.inf
        over = [value / TOLERANCE["fp32"][name] for name, value in differences.items() if name in ("scores", "boxes")]
        return np.inf if missing else float(np.max(over, initial=0.0))


def _classes(one: Classification, other: Classification) -> tuple[dict[str, float], bool]:
    """Differences of the classes that both name, and whether one names a class that the other should have."""
    of_one, of_other = ({int(i): p for i, p in zip(*_best(each), strict=True)} for each in (one, other))
    both = sorted(of_one.keys() & of_other.keys())
    p, q = (np.array([side[i] for i in both], np.float64) for side in (of_one, of_other))
    with np.errstate(divide="ignore", invalid="ignore"):  # both zero is no difference
        logits = np.nan_to_num(np.abs(np.log(p) - np.log(q)), nan=0.0, posinf=np.inf)
    tolerance = TOLERANCE["fp32"]["scores"]
    missing = any(
        value > min(theirs.values()) + tolerance
        for mine, theirs in ((of_one, of_other), (of_other, of_one))
        for index, value in mine.items()
        if index not in theirs
    )
    scores = np.abs(p - q).max(initial=0.0)
    return {"logits": float(logits.max(initial=0.0)), "scores": float(scores)}, missing


def _best(result: Classification) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    return result.indices[:TOP_K], result.probabilities[:TOP_K]


def _in_resized(result: Detections, artifact: DetectorArtifact) -> Output:
    """Detections with boxes in pixels of the resized image, in which the artefact's tolerance is."""
    (h, w), (fitted_h, fitted_w) = result.size, fitted_size(*result.size, artifact.preprocess)
    scale = np.array([fitted_w / w, fitted_h / h] * 2, np.float32)
    return {"boxes": result.boxes * scale, "scores": result.scores, "labels": result.indices}


def _same_bits(one: Classification | Detections, other: Classification | Detections) -> bool:
    if isinstance(one, Classification) and isinstance(other, Classification):
        return np.array_equal(_best(one)[0], _best(other)[0]) and np.array_equal(_best(one)[1], _best(other)[1])
    assert isinstance(one, Detections) and isinstance(other, Detections)
    names = ("boxes", "scores", "indices")
    same = one.size == other.size and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)
    return same and list(one.masks or ()) == list(other.masks or ())


def parting(expected: Source, found: Source, path: Path, bond: Bond, folder: Path) -> Stage:
    """The stage at which two places part on an image, by taking the stages away one after the other.

    A stage is taken away by doing it beforehand, without loss: a PNG of the decoded picture leaves nothing to a JPEG
    decoder or to EXIF, and one of the size that preprocessing makes leaves nothing to resize.

    Args:
        folder: where the two PNG files are left.
    """
    artifact = expected.metadata
    picture = decode(path)
    pictures = {"decoded": picture, "resized": _resized(picture, artifact)}
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png" for name in pictures]
    for file, image in zip(files, pictures.values(), strict=True):
        image.save(file)
    answers = list(zip(expected.rows(files), found.rows(files), strict=True))
    decoded, resized = (Agreement(artifact, bond) for _ in files)
    decoded.add(*answers[0])
    resized.add(*answers[1])
    if decoded.holds:
        return "decode"
    if _scores_agree(*answers[0], bond) or (not resized.holds and _scores_agree(*answers[1], bond)):
        return "post-processing"  # the network said the same, and labels or boxes were made of it in another way
    return "resize" if resized.holds else "graph"


def _resized(picture: Image.Image, artifact: Artifact) -> Image.Image:
    if isinstance(artifact.preprocess, ClassifierPreprocess):
        return classifier_resized(picture, artifact.preprocess)
    return Image.fromarray(detector_pixels(picture, artifact.preprocess).pixels)


def _scores_agree(expected: Row, found: Row, bond: Bond) -> bool:
    one, other = (_scores(row) for row in (expected, found))
    tolerance = 0.0 if bond == "exact" else TOLERANCE["fp32"]["scores"]
    return one.shape == other.shape and bool((np.abs(one - other) <= tolerance).all())


def _scores(row: Row) -> npt.NDArray[np.float32]:
    if isinstance(row.result, Classification):
        return _best(row.result)[1]
    return row.result.scores if row.result is not None else np.empty(0, np.float32)
