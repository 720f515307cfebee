import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared_data import real

from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess
from detection.augment import DetectionAugment
from detection.coco import EvaluationImages, TrainingImages, read_coco

SPEC = DetectorPreprocess(min_size=60, max_size=80, divisor=32)
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}]


def write(root: Path, annotations=(), images=None, **extra) -> tuple[str, str]:
    """A data set of two images of 120 x 90 and the annotations given; ids may be left out."""
    root.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (120, 90), (0, 50, 0)).save(root / name)
    listed = [{"id": i + 1, "file_name": name, "width": 120, "height": 90} for i, name in enumerate(("a.png", "b.png"))]
    listed = listed if images is None else images
    content = {"images": listed, "annotations": list(annotations), "categories": CATEGORIES, **extra}
    (root / "a.json").write_text(json.dumps(content))
    return str(root), str(root / "a.json")


def box(*xywh: float, category: int = 1, image: int = 1, **extra) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(xywh), **extra}


def test_ids_with_gaps_crowds_and_bad_boxes(tmp_path):
    dataset = read_coco(*write(tmp_path / "d", [
        box(10, 20, 30, 40, category=90), box(-5, 0, 20, 95), box(100, 80, 50, 50, iscrowd=1),
        box(10, 10, 0, 5), box(10, 10, 5, -1), box(200, 10, 5, 5), box(float("nan"), 0, 5, 5), box(119.8, 0, 0.3, 90),
        box(119.99999, 0, 5, 90),
    ]))  # fmt: skip
    assert dataset.category_ids == (1, 90)
    assert dataset.classes == ("person", "toothbrush")
    first, second = dataset.records
    np.testing.assert_allclose(first.boxes, [[10, 20, 40, 60], [0, 0, 15, 90], [119.8, 0, 120, 90]])
    assert first.labels.tolist() == [2, 1, 1]
    assert second.boxes.shape == (0, 4)
    assert dataset.cleaned == {"crowds": 1, "clipped": 1, "dropped": 5}
    assert str(dataset) == "2 images (1 without objects), 3 boxes; 1 crowds, 1 clipped, 5 dropped"


def test_training_items_scale_boxes_with_the_image(tmp_path):
    dataset = read_coco(*write(tmp_path / "d", [box(12, 9, 24, 18)]))
    items = TrainingImages(dataset, SPEC, DetectionAugment(0, 0, 0, 0, seed=0))
    image, target = items[0]
    assert image.shape == (3, 60, 80)
    assert 0 <= image.min() <= image.max() <= 1
    np.testing.assert_allclose(target["boxes"], [[8, 6, 24, 18]], atol=1e-4)
    image, target = items[1]
    assert target["boxes"].shape == (0, 4)
    assert EvaluationImages(dataset, SPEC)[1][0] == 2


def test_boxes_follow_their_object_through_every_augmentation():
    """Draw each box as a white block; wherever augmentation puts the block, the box has to be."""
    augment = DetectionAugment(0.5, 0.5, 0.0, 0.7, seed=3)
    moved = set()
    for index in range(40):
        pixels = np.zeros((90, 120, 3), np.uint8)
        pixels[20:50, 30:80] = 255
        boxes = np.array([[30, 20, 80, 50]], np.float32)
        image, (found,), labels = augment(Image.fromarray(pixels), boxes, np.array([7]), index)
        ys, xs = np.nonzero(np.asarray(image)[..., 0] > 127)
        np.testing.assert_allclose(found, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.01)
        assert labels.tolist() == [7]
        moved.add((image.size, tuple(np.round(found))))
    assert len(moved) > 10


def test_augmentation_takes_no_boxes_and_boxes_at_the_edge():
    augment = DetectionAugment(0.5, 0.5, 0.2, 0.5, seed=0)
    image = Image.new("RGB", (64, 48))
    for index in range(10):
        assert augment(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), index)[1].shape == (0, 4)
        boxes = augment(image, np.array([[0, 0, 64.00001, 48]], np.float32), np.array([1]), index)[1]
        assert boxes.shape == (1, 4)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (None, str(root)), "data.images and data.annotations are not both set"),
        (lambda root: (str(root / "no"), str(root / "a.json")), "data.images=.*no is no folder"),
        (lambda root: (str(root), str(root / "no.json")), "cannot read .*no.json"),
        (lambda root: ((root / "a.json").write_text("{"), (str(root), str(root / "a.json")))[1], "is not JSON"),
        (
            lambda root: ((root / "a.json").write_text("[]"), (str(root), str(root / "a.json")))[1],
            "not in COCO's format",
        ),
        (lambda root: write(root, [box(1, 2, 3)]), "not in COCO's format: an entry lacks or breaks"),
        (lambda root: write(root, [box(1, 2, 3, 4, image=9)]), "unknown image or category"),
        (lambda root: write(root, [box(1, 2, 3, 4, category=2)]), "unknown image or category"),
        (lambda root: write(root, images=[{"id": 1, "file_name": "no.png"}]), "lists no.png, which is not in"),
        (lambda root: write(root, images=[{"id": 1, "file_name": "a.png"}] * 2), "images need ids"),
        (lambda root: write(root, images=[{"id": "1", "file_name": "a.png"}]), "images need ids"),
        (lambda root: write(root, images=[]), "images need ids"),
        (lambda root: write(root, categories=CATEGORIES * 2), "categories need ids"),
        (lambda root: write(root, categories=[]), "categories need ids"),
        (lambda root: write(root, images=[{"id": 1}]), "not in COCO's format: an entry lacks or breaks 'file_name'"),
    ],
)
def test_bad_data_is_an_error_with_a_remedy(tmp_path, break_it, message):
    write(tmp_path / "d")
    images, annotations = break_it(tmp_path / "d")
    with pytest.raises(InputError, match=message):
        read_coco(images, annotations, "data.")


def test_a_models_categories_are_the_data_sets(tmp_path):
    dataset = read_coco(*write(tmp_path / "d"))
    dataset.check_categories([1, 2], ["person", "bicycle"], "m")
    with pytest.raises(InputError, match="category 1 is 'cat' for m and 'person' in the annotations"):
        dataset.check_categories([1], ["cat"], "m")
    with pytest.raises(InputError, match="m and the annotations have no category id in common"):
        dataset.check_categories([7], ["cat"], "m")


def test_a_size_that_contradicts_the_annotations_is_an_error(tmp_path):
    images = [{"id": 1, "file_name": "a.png", "width": 90, "height": 120}]
    dataset = read_coco(*write(tmp_path / "d", images=images))
    with pytest.raises(InputError, match="is 120x90 upright, but its annotations say 90x120"):
        EvaluationImages(dataset, SPEC)[0]


def test_real_coco_has_eighty_classes():
    root = real("coco_ccby")
    dataset = read_coco(str(root / "images"), str(root / "instances_val.json"))
    assert (len(dataset.records), len(dataset.classes), dataset.category_ids[-1]) == (45, 80, 90)
    assert dataset.cleaned["crowds"] > 0
