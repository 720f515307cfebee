"""COCO's 12 figures by `metric: fast` against plain pycocotools, on a synthetic set of the size of COCO's val2017.

    python -m benchmarks.coco_metric [--images 5000] [--objects 36781] [--rounds 3] [--json FILE]

In every round each has its turn, from an annotation file and a list of detections to the figures; pycocotools is
called by hand and changes the detections it is given, so that it gets a copy that is not timed. Ours checks the
detections and gives each class's AP, too. Figures that differ by more than TOLERANCE in any round are a failure, with
exit status 1.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbones.cli import at_least
from backbones.errors import exit_on_input_error
from backbones.files import versions, write_json
from benchmarks.contest import table
from detection.coco_eval import FIGURES, Row, evaluate, to_results

WIDTH, HEIGHT = 640, 480
TOLERANCE = 1e-9


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=at_least(1), default=5000)
    parser.add_argument("--objects", type=at_least(1), default=36_781)
    parser.add_argument("--categories", type=at_least(1), default=80)
    parser.add_argument("--detections", type=at_least(1), default=100, help="of each image")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    truth, results = synthetic(args.images, args.objects, args.categories, args.detections, args.seed)
    seconds: dict[str, list[float]] = {"fast": [], "pycocotools": []}
    difference = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        path.write_text(json.dumps(truth))
        for turn in range(args.rounds):
            figures = {}
            for name in sorted(seconds, reverse=bool(turn % 2)):  # who comes first changes
                given = copy.deepcopy(results) if name == "pycocotools" else results
                start = time.perf_counter()
                figures[name] = plain(path, given) if name == "pycocotools" else evaluate(path, given, "fast")
                seconds[name].append(time.perf_counter() - start)
            difference = max(
                difference, *(abs(figures["fast"][name] - figures["pycocotools"][name]) for name in FIGURES)
            )
            print(f"round {turn + 1}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()))
    ratios = [slow / fast for slow, fast in zip(seconds["pycocotools"], seconds["fast"], strict=True)]
    result = {
        "settings": vars(args) | {"json": None}, "cores": os.cpu_count(), "crowds": _crowds(truth),
        "versions": versions("pycocotools", "faster-coco-eval", "numpy"),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()}, "all_seconds": seconds,
        "times_as_fast": statistics.median(ratios), "largest_difference": difference,
        "figures": {name: figures["pycocotools"][name] for name in FIGURES},
    }  # fmt: skip
    print(markdown(result))
    if args.json:
        write_json(args.json, result)
    if difference > TOLERANCE:
        raise SystemExit(1)


def plain(annotations: Path, results: list[Row]) -> dict[str, float]:
    """pycocotools as its documentation shows it."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}


def synthetic(
    images: int, objects: int, categories: int, per_image: int, seed: int
) -> tuple[dict[str, Any], list[Row]]:
    """Annotations, with crowds and a few classes that are most of the objects, and detections: of each object up to
    four boxes of different quality, most of its class, and for the rest boxes anywhere with lower scores.
    """
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(np.arange(1, categories + categories // 8 + 1), categories, replace=False)).tolist()
    share = 1 / np.arange(1, categories + 1)
    share /= share.sum()
    owner = np.sort(rng.integers(images, size=objects))
    labels = rng.choice(categories, size=objects, p=share)
    boxes = _boxes(rng, objects)
    crowds = rng.random(objects) < 0.012
    annotations = [
        {
            "id": i + 1, "image_id": int(owner[i]) + 1, "category_id": ids[labels[i]], "iscrowd": int(crowds[i]),
            "bbox": [x, y, w, h], "area": w * h * 0.7,
        }
        for i, (x, y, w, h) in enumerate(boxes.tolist())
    ]  # fmt: skip
    results = []
    for image in range(images):
        mine = np.flatnonzero(owner == image)
        near = np.repeat(mine, rng.integers(0, 5, len(mine)))[:per_image]
        jitter = np.exp(rng.normal(0, 0.15, (len(near), 2)))
        move = rng.normal(0, 0.12, (len(near), 2)) * boxes[near, 2:]
        found = np.concatenate((boxes[near, :2] + move, boxes[near, 2:] * jitter), axis=1)
        wrong = rng.random(len(near)) < 0.15
        classes = np.where(wrong, rng.choice(categories, size=len(near), p=share), labels[near])
        rest = per_image - len(near)
        found = np.concatenate((found, _boxes(rng, rest)))
        classes = np.concatenate((classes, rng.choice(categories, size=rest, p=share)))
        scores = np.concatenate((rng.beta(3, 2, len(near)), rng.beta(1, 8, rest))).round(4)
        corners = np.concatenate((found[:, :2], found[:, :2] + found[:, 2:]), axis=1).astype(np.float32)
        results += to_results(image + 1, corners, scores, [ids[label] for label in classes])
    listed = [{"id": i + 1, "file_name": f"{i + 1}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(images)]
    names = [{"id": i, "name": f"class {i}"} for i in ids]
    return {"images": listed, "annotations": annotations, "categories": names}, results


def markdown(result: dict[str, Any]) -> str:
    """Seconds of each, their ratio, and how far the figures are apart."""
    head = ["images", "objects", "detections", "fast, s", "pycocotools, s", "times as fast", "largest difference"]
    said, seconds = result["settings"], result["seconds"]
    counts = (str(count) for count in (said["images"], said["objects"], said["images"] * said["detections"]))
    took = (f"{seconds[name]:.2f}" for name in ("fast", "pycocotools"))
    row = [*counts, *took, f"{result['times_as_fast']:.1f}", f"{result['largest_difference']:.1e}"]
    return "\n".join(table(head, [row]))


def _boxes(rng: np.random.Generator, count: int) -> Any:
    """x, y, w, h [count, 4] inside the image, small ones more often than large ones."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 1)) + rng.normal(0, 0.3, (count, 2)))
    sides = np.minimum(sides, (WIDTH, HEIGHT))
    return np.concatenate((rng.random((count, 2)) * ((WIDTH, HEIGHT) - sides), sides), axis=1).round(2)


def _crowds(truth: dict[str, Any]) -> int:
    return sum(annotation["iscrowd"] for annotation in truth["annotations"])


if __name__ == "__main__":
    with exit_on_input_error():
        main()
