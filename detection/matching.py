"""Which detection finds which object: the matches that a detector's AP50 is made of.

Of boxes, at an IoU of 0.5, matched as COCO matches them, so that the AP50 here is COCO's; masks are not looked at.

Shapes: D detections, G objects (crowds among them), C classes, I images. A label is a position among the classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle

from detection.coco_eval import class_names

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU: what counts as found, and what is no overlap worth the name
LIMIT = 100  # detections of an image and a class that COCO counts
NONE = -1
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scenes:
    """Objects and detections of a data set; `images` are positions among `image_ids`, boxes are x, y, w, h.

    Attributes:
        image_ids: int64 [I], rising.
        classes: [C].
        truth_images, truth_labels, crowd: [G]; `truth_boxes` [G, 4].
        images, labels, scores: [D], by falling score; `boxes` [D, 4].
    """

    image_ids: Ints
    classes: list[str]
    truth_images: Ints
    truth_labels: Ints
    truth_boxes: Floats
    crowd: Bools
    images: Ints
    labels: Ints
    boxes: Floats
    scores: Floats


def scenes(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Scenes:
    """Annotations, as `load_annotations` gives them, and detections that `check_results` has passed.

    Left out is what does not count for COCO: detections of other categories than those listed, and all but the
    `LIMIT` best detections of an image and a class.
    """
    names = class_names(truth)
    image_ids = np.array(sorted(image["id"] for image in truth["images"]), dtype=np.int64)
    categories = np.array(list(names), dtype=np.int64)
    annotations = truth["annotations"]
    results = [row for row in results if row["category_id"] in names]
    objects = _columns(annotations, image_ids, categories)
    crowd = np.array([bool(annotation["iscrowd"]) for annotation in annotations], dtype=bool)
    images, labels, boxes = _columns(results, image_ids, categories)
    scores = np.array([row["score"] for row in results], dtype=np.float64)
    order = np.lexsort((images, -scores))  # of equal scores the earlier image comes first, as in pycocotools
    images, labels, boxes, scores = images[order], labels[order], boxes[order], scores[order]
    kept = _places(images * max(1, len(names)) + labels) < LIMIT
    return Scenes(
        image_ids, list(names.values()), *objects, crowd, images[kept], labels[kept], boxes[kept], scores[kept]
    )


def _columns(rows: Sequence[Mapping[str, Any]], image_ids: Ints, categories: Ints) -> tuple[Ints, Ints, Floats]:
    images = np.searchsorted(image_ids, np.array([row["image_id"] for row in rows], dtype=np.int64))
    labels = np.searchsorted(categories, np.array([row["category_id"] for row in rows], dtype=np.int64))
    return images, labels, np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)


def _places(groups: Ints) -> Ints:
    """How many of the same group stand before each; [n] -> [n]."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(groups) else np.empty(0, dtype=np.int64)
    places = np.empty(len(groups), dtype=np.int64)
    places[order] = np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))
    return places


@dataclass(frozen=True)
class Matches:
    """What each detection has to do with the objects of its image; crowds are in `ignored` alone.

    Attributes:
        truth: int64 [D], the object that it finds, or NONE.
        ignored: bool [D], finds nothing, but lies on a crowd of its class.
        own, other: int64 [D], the object of its class and of another class that it overlaps most, or NONE.
        own_iou, other_iou: float64 [D].
        found: bool [G].
        pairs: int64 [P, 2], detection and object, all that have an IoU of 0.5, whatever their classes.
        pair_iou: float64 [P].
    """

    truth: Ints
    ignored: Bools
    own: Ints
    own_iou: Floats
    other: Ints
    other_iou: Floats
    found: Bools
    pairs: Ints
    pair_iou: Floats


def match(given: Scenes) -> Matches:
    """Match as COCO does at an IoU of 0.5: by falling score, each detection takes the object of its class that it
    overlaps most of those still free.
    """
    count = len(given.scores)
    truth, ignored = np.full(count, NONE, dtype=np.int64), np.zeros(count, dtype=bool)
    best = {same: (np.full(count, NONE, dtype=np.int64), np.zeros(count)) for same in (True, False)}
    pairs, ious = [np.empty((0, 2), dtype=np.int64)], [np.empty(0)]
    for mine, theirs in _by_image(given):
        crowd = given.crowd[theirs]
        iou = rle.iou(
            given.boxes[mine], given.truth_boxes[theirs], crowd.tolist()
        )  # [d, g]; of a crowd d's share on it
        same = given.labels[mine][:, None] == given.truth_labels[theirs]
        real = ~crowd
        if real.any():
            for which, (index, value) in best.items():
                masked = np.where((same == which) & real, iou, -1.0)
                column = masked.argmax(axis=1)
                highest = masked[np.arange(len(mine)), column]
                index[mine] = np.where(highest > 0, theirs[column], NONE)
                value[mine] = np.maximum(highest, 0)
            rows, columns = np.nonzero((iou >= FOREGROUND) & real)
            pairs.append(np.stack((mine[rows], theirs[columns]), axis=1))
            ious.append(iou[rows, columns])
            _take(truth, mine, theirs, np.where(same & real, iou, 0))
        ignored[mine] = (truth[mine] == NONE) & (same & ~real & (iou >= FOREGROUND)).any(axis=1)
    found = np.zeros(len(given.crowd), dtype=bool)
    found[truth[truth != NONE]] = True
    return Matches(truth, ignored, *best[True], *best[False], found, np.concatenate(pairs), np.concatenate(ious))


def _take(truth: Ints, mine: Ints, theirs: Ints, iou: Floats) -> None:
    """Fill in `truth` for the detections `mine`, by falling score; `iou` [d, g] is 0 where the classes differ."""
    free = np.ones(len(theirs), dtype=bool)
    for row in np.flatnonzero((iou >= FOREGROUND).any(axis=1)):
        possible = np.where(free, iou[row], 0)
        column = len(possible) - 1 - int(possible[::-1].argmax())  # of equals the last, as pycocotools
        if possible[column] >= FOREGROUND:
            truth[mine[row]] = theirs[column]
            free[column] = False


def _by_image(given: Scenes) -> list[tuple[Ints, Ints]]:
    """The detections, by falling score, and the objects of each image that has both."""
    order, truth_order = (np.argsort(images, kind="stable") for images in (given.images, given.truth_images))
    edges = np.arange(1, len(given.image_ids))
    mine = np.split(order, np.searchsorted(given.images[order], edges))
    theirs = np.split(truth_order, np.searchsorted(given.truth_images[truth_order], edges))
    return [(d, g) for d, g in zip(mine, theirs, strict=True) if len(d) and len(g)]
