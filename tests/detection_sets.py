"""Annotations and detections for tests, by hand and at random."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

SIZE = 100


def annotations(boxes, categories=("car", "train"), crowds=(), images=3) -> dict:
    """`boxes` are (image, category, [x, y, w, h]); categories have the ids 3, 7, 11, … and images 1, 2, 3, …"""
    return {
        "images": [{"id": i + 1, "file_name": f"{i + 1}.png", "width": SIZE, "height": SIZE} for i in range(images)],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3],
             "iscrowd": int(i in crowds)}
            for i, (image, category, box) in enumerate(boxes)
        ],
        "categories": [{"id": 3 + 4 * i, "name": name} for i, name in enumerate(categories)],
    }  # fmt: skip


def detection(image, category, box, score) -> dict:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def random_set(seed: int, masks: bool = False, images: int = 12) -> tuple[dict, list[dict]]:
    """Objects of four classes, of which one has none, crowds among them, and detections near them and anywhere, with
    scores that often are equal; up to 130 of an image and class, more than COCO counts.
    """
    rng = np.random.default_rng(seed)

    def boxes(count: int) -> np.ndarray:
        sides = rng.uniform(3, 60, (count, 2))
        return np.concatenate((rng.random((count, 2)) * (SIZE - sides), sides), axis=1)

    objects, results = [], []
    for image in range(1, images):  # the last image has nothing
        mine = boxes(int(rng.integers(0, 8)))
        labels = rng.choice([3, 7, 11], len(mine))
        objects += [(image, int(label), box.tolist()) for label, box in zip(labels, mine, strict=True)]
        for label, box in zip(labels, mine, strict=True):
            for _ in range(rng.integers(0, 4)):
                near = box + rng.normal(0, 0.1, 4) * np.tile(box[2:], 2)
                near = np.r_[near[:2].clip(0, SIZE - 2), near[2:].clip(1)]
                category = int(label) if rng.random() < 0.8 else int(rng.choice([3, 7, 11, 15]))
                results.append(detection(image, category, near.tolist(), round(float(rng.random()), 1)))
        anywhere = boxes(130 if image == 1 else 3)
        results += [detection(image, 15 if image == 2 else 7, box.tolist(), 0.1) for box in anywhere]
    crowds = set(rng.choice(len(objects), 5, replace=False).tolist())
    truth = annotations(objects, ("car", "train", "bus", "boat"), crowds, images)
    if masks:
        for row in [*truth["annotations"], *results]:
            row["segmentation"] = blob(rng, row["bbox"])
        for row in truth["annotations"]:
            row["area"] = float(rle.area(row["segmentation"]))
    return truth, results


def blob(rng: np.random.Generator, box: list[float]) -> dict:
    """A mask that fills most of a box, as run lengths."""
    x, y, w, h = (max(1, round(value)) for value in box)
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    pixels[y : y + h, x : x + w] = 1
    run = rle.encode(np.asfortranarray(pixels * (rng.random((SIZE, SIZE)) < 0.95)).astype(np.uint8, order="F"))
    return {"size": [SIZE, SIZE], "counts": run["counts"].decode()}
