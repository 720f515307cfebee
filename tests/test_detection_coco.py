import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared_data import real

from backbones.errors import InputError
from detection.coco import load_annotations, read_coco
from detection.masks import decode

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


SQUARE = [10, 20, 40, 20, 40, 60, 10, 60]


def test_masks_are_kept_where_they_are_usable(tmp_path):
    broken = [{}, {"segmentation": []}, {"segmentation": [[1, 2, 3, 4]]}, {"segmentation": "no"}]
    broken += [{"segmentation": {"size": [5, 5], "counts": [25]}}, {"segmentation": [["a"] * 6]}, {"segmentation": 3}]
    annotations = [box(10, 20, 30, 40, segmentation=[SQUARE]), box(10, 10, 0, 5, segmentation=[SQUARE])]
    annotations += [box(10, 20, 30, 40, **extra) for extra in broken]
    annotations += [box(0, 0, 9, 9, iscrowd=1, segmentation={"size": [90, 120], "counts": [10800]})]
    root = write(tmp_path / "d", annotations)
    dataset = read_coco(*root, masks=True)
    segmentations = dataset.records[0].segmentations
    assert segmentations is not None
    assert [one is not None for one in segmentations] == [True] + [False] * len(broken)
    assert dataset.cleaned == {"crowds": 1, "clipped": 0, "dropped": 1, "without_mask": len(broken)}
    np.testing.assert_array_equal(decode(segmentations[0], 90, 120), decode([SQUARE], 90, 120))
    assert dataset.records[1].segmentations == ()
    assert read_coco(*root).records[0].segmentations is None
    with pytest.raises(InputError, match="no segmentations to learn masks from: choose a detector without masks"):
        read_coco(*write(tmp_path / "d", [box(1, 2, 3, 4)]), masks=True)


def test_a_mask_of_another_size_than_its_images_is_not_usable(tmp_path):
    """Though the file says no size."""
    turned, whole = ({"size": size, "counts": [10800]} for size in ([120, 90], [90, 120]))
    annotations = [box(12, 9, 24, 18, segmentation=runs) for runs in (turned, whole)]
    dataset = read_coco(*write(tmp_path / "d", annotations, [{"id": 1, "file_name": "a.png"}]), masks=True)
    assert dataset.records[0].segmentations == (None, whole)
    assert dataset.cleaned["without_mask"] == 1


def test_objects_are_numbered_for_pycocotools_and_keep_their_segmentations(tmp_path):
    annotations = [box(1, 2, 3, 4, id=0, segmentation=[SQUARE]), box(1, 2, 3, 4, id=0)]
    raw = load_annotations(write(tmp_path / "d", annotations)[1])
    assert [annotation["id"] for annotation in raw["annotations"]] == [1, 2]
    assert raw["annotations"][0] | {"id": 0} == annotations[0] | {"area": 12, "iscrowd": 0}


def test_boxes_are_clipped_to_an_image_whose_size_the_file_does_not_say(tmp_path):
    images = [{"id": 1, "file_name": "a.png"}]
    dataset = read_coco(*write(tmp_path / "d", [box(100, 80, 50, 50), box(130, 0, 20, 20)], images))
    assert dataset.records[0].boxes.tolist() == [[100, 80, 120, 90]]
    assert (dataset.cleaned["clipped"], dataset.cleaned["dropped"]) == (1, 1)


def test_null_is_as_left_out(tmp_path):
    images = [
        {"id": 1, "file_name": "a.png", "width": 120.0, "height": 90},
        {"id": 2, "file_name": "b.png", "width": 0},
    ]
    path = write(tmp_path / "d", [box(1, 2, 3, 4, area=None, iscrowd=None)], images)[1]
    raw = load_annotations(path)
    assert raw["annotations"][0] == box(1, 2, 3, 4, id=1, area=12, iscrowd=0)
    assert type(raw["images"][0]["width"]) is int
    assert read_coco(str(tmp_path / "d"), path).records[1].size is None


def test_masks_are_evaluated_on_images_of_known_size(tmp_path):
    images = [{"id": 1, "file_name": "a.png", "width": 120}]
    root = write(tmp_path / "d", [box(1, 2, 3, 4, segmentation=[SQUARE])], images)
    with pytest.raises(InputError, match="image 1 of the annotations needs height and width to evaluate masks"):
        read_coco(*root, sized=True)
    read_coco(*write(tmp_path / "d", [box(1, 2, 3, 4, segmentation=[])], images), sized=True)  # there are none


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (box(1, 2, 3, "4"), r"breaks bbox=\[1, 2, 3, '4'\]"),
        (box(1, 2, 3, 10**400), r"breaks bbox=\[1, 2, 3, 1000"),
        (box(1, 2, 3, 4, area="5"), "breaks area='5'"),
        (box(1, 2, 3, 4, iscrowd="0"), "breaks iscrowd='0'"),
        (box(1, 2, 3, 4, image=[1]), "is of an unknown image or category"),
        (box(1, 2, 3, 4, category={}), "is of an unknown image or category"),
        ({"bbox": [1, 2, 3, 4], "image_id": 1}, "breaks 'category_id'"),
        (7, "is not in COCO's format"),
    ],
)
def test_a_broken_annotation_is_the_same_line_for_training_and_for_scoring(tmp_path, entry, message):
    images, annotations = write(tmp_path / "d", [entry])
    for read in (lambda: load_annotations(annotations), lambda: read_coco(images, annotations)):
        with pytest.raises(InputError, match=f"{message}.*check-data --annotations"):
            read()


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
        (lambda root: write(root, [box(1, 2, 3)]), "an entry lacks or breaks .*check-data --annotations"),
        (
            lambda root: write(root, [box(1, 2, 3, 4, image=9, id=77)]),
            "annotation 77 is of an unknown image or category: `python -m detection check-data --annotations .*a.json`",
        ),
        (lambda root: write(root, [box(1, 2, 3, 4, category=2)]), "unknown image or category"),
        (lambda root: write(root, images=[{"id": 1, "file_name": "no.png"}]), "lists no.png, which is not in"),
        (lambda root: write(root, images=[{"id": 1, "file_name": "a.png"}] * 2), "images need ids"),
        (lambda root: write(root, images=[{"id": "1", "file_name": "a.png"}]), "images need ids"),
        (lambda root: write(root, images=[]), "images need ids"),
        (
            lambda root: write(root, images=[{"id": 1, "file_name": "a.png", "width": "120", "height": 90}]),
            "an entry lacks or breaks width='120'",
        ),
        (
            lambda root: write(root, images=[{"id": 1, "file_name": "a.png", "width": float("inf"), "height": 90}]),
            "an entry lacks or breaks width=inf",
        ),
        (lambda root: write(root, images=[{"id": 1, "file_name": 7}]), "an entry lacks or breaks file_name=7"),
        (lambda root: write(root, images=[{"id": 10**30, "file_name": "a.png"}]), "images need ids"),
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


def test_real_coco_has_eighty_classes():
    root = real("coco_ccby")
    dataset = read_coco(str(root / "images"), str(root / "instances_val.json"))
    assert (len(dataset.records), len(dataset.classes), dataset.category_ids[-1]) == (45, 80, 90)
    assert dataset.cleaned["crowds"] > 0
    masks = read_coco(str(root / "images"), str(root / "instances_val.json"), masks=True)
    assert masks.cleaned == dataset.cleaned | {"without_mask": 0}
