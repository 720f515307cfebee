"""What a detector's AP50 is made of, and what it is lost to: precision-recall curves, a confusion matrix and kinds of
errors. Shapes as in `matching.py`.

The kinds are those of Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", arXiv
2008.08115, sections 2.2 and 2.3, with its thresholds of 0.5 and 0.1. A detection that fits several has the first in the
order of the authors' toolbox: localisation, classification, duplicate, background, both. Deviations: the AP50 is
COCO's, over the classes that have objects, while the toolbox counts a class that has detections alone as 0; and where
several detections are to be repaired into one object, the best of the kind in question is, even if a better one has an
error of another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detection.matching import BACKGROUND, FOREGROUND, NONE, Bools, Floats, Ints, Matches, Scenes, match, scenes

RECALLS = np.linspace(0, 1, 101)
# What a kind of error is, and how it is repaired.
KINDS = {
    "classification": "overlaps an object of another class by 0.5 or more; repaired by giving it that class",
    "localisation": "overlaps an object of its class by 0.1 to 0.5; repaired by giving it that object's box",
    "both": "overlaps an object of another class by 0.1 to 0.5 and none of its own; repaired by leaving it out",
    "duplicate": "overlaps an object of its class by 0.5 or more that a better one found; repaired by leaving it out",
    "background": "overlaps no object by 0.1; repaired by leaving it out",
    "missed": "an object that nothing found and no error of the first two kinds is about; repaired by leaving it out",
}
CLS, LOC, BOTH, DUP, BKG, MISSED = range(6)


@dataclass(frozen=True)
class Analysis:
    """What `analyse` finds.

    Attributes:
        curves: of each class that has objects, the precision at 101 recalls, [101].
        threshold: the score from which on detections have the best F1, all classes together; `f1` is that.
        confusion: int64 [C + 1, C + 1] at that threshold, as `confusion` counts.
        errors: int64 [I], wrong detections and missed objects of each image at that threshold.
        kinds: as `error_kinds` gives them.
    """

    scenes: Scenes
    matches: Matches
    curves: dict[str, Floats]
    threshold: float
    f1: float
    confusion: Ints
    errors: Ints
    kinds: dict[str, Any]


def analyse(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Analysis:
    """Annotations, as `load_annotations` gives them, and detections that `check_results` has passed."""
    given = scenes(truth, results)
    matches = match(given)
    threshold, f1 = best_threshold(given, matches)
    counts, errors = confusion(given, matches, threshold)
    kinds = error_kinds(given, matches)
    return Analysis(given, matches, curves(given, matches), threshold, f1, counts, errors, kinds)


def precision_recall(right: Bools, positives: int) -> tuple[Floats, Floats]:
    """Precision and recall after each detection of a class, by falling score; [n] -> [n], [n]."""
    hits = np.cumsum(right)
    return hits / np.arange(1, len(right) + 1), hits / max(1, positives)


def interpolated(right: Bools, positives: int) -> Floats:
    """COCO's precision at 101 recalls: the best at that recall or above; 0 where it is not reached."""
    precision, recall = precision_recall(right, positives)
    highest = np.r_[np.maximum.accumulate(precision[::-1])[::-1], 0.0]
    return highest[np.searchsorted(recall, RECALLS, side="left")]


def curves(given: Scenes, matches: Matches) -> dict[str, Floats]:
    """Interpolated precision [101] of each class that has objects; its mean is the class's AP50."""
    positives = np.bincount(given.truth_labels[~given.crowd], minlength=len(given.classes))
    rights = split_by_class(given.labels, matches.truth != NONE, ~matches.ignored, len(given.classes))
    return {
        name: interpolated(right, int(count))
        for name, right, count in zip(given.classes, rights, positives, strict=True)
        if count
    }


def split_by_class(labels: Ints, right: Bools, kept: Bools, classes: int) -> list[Bools]:
    """Right or not of the detections that are kept, for each class."""
    order = np.argsort(labels, kind="stable")
    order = order[kept[order]]
    return np.split(right[order], np.searchsorted(labels[order], np.arange(1, classes)))


def best_threshold(given: Scenes, matches: Matches) -> tuple[float, float]:
    """The score from which on detections have the highest F1 of precision and recall, all classes together, and that
    F1; both 0 where nothing is found.
    """
    kept = ~matches.ignored
    scores, hits = given.scores[kept], np.cumsum(matches.truth[kept] != NONE)
    if not len(hits) or not hits[-1]:
        return 0.0, 0.0
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + np.count_nonzero(~given.crowd))
    f1[:-1][scores[:-1] == scores[1:]] = 0  # a threshold lets in all of one score
    place = int(f1.argmax())
    return float(scores[place]), float(f1[place])


def confusion(given: Scenes, matches: Matches, threshold: float) -> tuple[Ints, Ints]:
    """Truth against prediction of the detections with at least that score, [C + 1, C + 1]; the last row is false
    alarms, the last column objects that were missed. And each image's number of errors, [I].

    A detection that finds an object of its class, as `match` says, is that object's. The others go to objects of
    other classes that they overlap by 0.5 and nothing found, the largest overlap first.
    """
    classes = len(given.classes)
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    errors = np.zeros(len(given.image_ids), dtype=np.int64)
    shown = given.scores >= threshold
    partner = np.where(shown, matches.truth, NONE)
    taken = given.crowd.copy()
    taken[partner[partner != NONE]] = True
    open_ = shown & (partner == NONE) & ~matches.ignored
    order = np.argsort(-matches.pair_iou, kind="stable")
    for detection, object_ in matches.pairs[order[open_[matches.pairs[order, 0]]]].tolist():
        if partner[detection] == NONE and not taken[object_]:
            partner[detection], taken[object_] = object_, True
    paired = partner != NONE
    np.add.at(counts, (given.truth_labels[partner[paired]], given.labels[paired]), 1)
    np.add.at(counts[-1], given.labels[open_ & ~paired], 1)
    np.add.at(counts[:, -1], given.truth_labels[~taken], 1)
    wrong = paired & (given.truth_labels[partner] != given.labels) if len(given.truth_labels) else paired
    np.add.at(errors, given.images[wrong | (open_ & ~paired)], 1)
    np.add.at(errors, given.truth_images[~taken], 1)
    return counts, errors


def error_kinds(given: Scenes, matches: Matches) -> dict[str, Any]:
    """`AP50` (-1 without objects), and of each of the `kinds` how many errors there are (`count`) and the AP50 that is
    gained by repairing it alone (`dAP50`).
    """
    kind, target, missed = kinds_of(given, matches)
    right, kept = matches.truth != NONE, ~matches.ignored
    positives = np.bincount(given.truth_labels[~given.crowd], minlength=len(given.classes))
    before = _mean_ap(given.labels, right, kept, positives, positives)
    kinds = {}
    for number, name in enumerate(KINDS):
        count, labels, repaired, left, objects = int((kind == number).sum()), given.labels, right, kept, positives
        if number == MISSED:
            count = int(missed.sum())
            objects = positives - np.bincount(given.truth_labels[missed], minlength=len(given.classes))
        else:
            mended = _firsts(np.where((kind == number) & (target != NONE), target, NONE), matches.found)
            labels, repaired, left = labels.copy(), right.copy(), kept & ((kind != number) | mended)
            labels[mended], repaired[mended] = given.truth_labels[target[mended]], True
        after = _mean_ap(labels, repaired, left, objects, positives)
        kinds[name] = {"count": count, "dAP50": after - before}
    return {"AP50": before, "kinds": kinds}


def kinds_of(given: Scenes, matches: Matches) -> tuple[Ints, Ints, Bools]:
    """The kind of each detection, [D], NONE where it is right or lies on a crowd; the object that a repair gives it,
    [D], or NONE; and which objects are missed, [G].
    """
    own, other = matches.own_iou, matches.other_iou
    fits = (
        ((matches.truth != NONE) | matches.ignored, NONE),
        ((own >= BACKGROUND) & (own < FOREGROUND), LOC),
        (other >= FOREGROUND, CLS),
        (own >= FOREGROUND, DUP),
        (np.maximum(own, other) < BACKGROUND, BKG),
    )
    kind = np.select([condition for condition, _ in fits], [number for _, number in fits], BOTH)
    target = np.select([kind == LOC, kind == CLS], [matches.own, matches.other], NONE)
    missed = ~matches.found & ~given.crowd
    missed[target[target != NONE]] = False
    return kind, target, missed


def _firsts(target: Ints, found: Bools) -> Bools:
    """Which detections, by falling score, are the first to aim at an object that is not found; [D]."""
    aiming = np.flatnonzero(target != NONE)
    aiming = aiming[~found[target[aiming]]]
    first = np.zeros(len(target), dtype=bool)
    first[aiming[np.unique(target[aiming], return_index=True)[1]]] = True
    return first


def _mean_ap(labels: Ints, right: Bools, kept: Bools, positives: Ints, counted: Ints) -> float:
    """AP50 over the classes that are `counted`; one whose last object was left out is perfect without detections."""
    parts = split_by_class(labels, right, kept, len(positives))
    values = [
        interpolated(part, int(count)).mean() if count else float(not len(part))
        for part, count, wanted in zip(parts, positives, counted, strict=True)
        if wanted
    ]
    return float(np.mean(values)) if values else -1.0
