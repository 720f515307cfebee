import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from shared_data import real
from test_detection_coco import box, write

from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess, ImageError, decode, detector_pixels, upright_size
from detection.augment import DetectionAugment
from detection.coco import read_coco
from detection.images import EvaluationImages, TrainingImages, aspect_ratios, create_loader, to_image

SPEC = DetectorPreprocess(min_size=60, max_size=80, divisor=32)
PLAIN = DetectionAugment(seed=0)


def test_training_items_scale_boxes_with_the_image(tmp_path):
    dataset = read_coco(*write(tmp_path / "d", [box(12, 9, 24, 18)]))
    items = TrainingImages(dataset, SPEC, PLAIN)
    image, target = items[0]
    assert (image.shape, image.dtype) == ((60, 80, 3), torch.uint8)
    assert to_image(image).shape == (3, 60, 80)
    assert torch.equal(to_image(image)[1], image[..., 1] / 255)
    np.testing.assert_allclose(target["boxes"], [[8, 6, 24, 18]], atol=1e-4)
    assert target.keys() == {"boxes", "labels"}
    image, target = items[1]
    assert target["boxes"].shape == (0, 4)
    assert EvaluationImages(dataset, SPEC)[1][0] == 2


def test_training_without_augmentation_sees_the_pixels_of_evaluation(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    for interpolation in ("bilinear", "bicubic"):
        spec = SPEC.model_copy(update={"interpolation": interpolation})
        images, annotations = write(tmp_path / "d", images=[{"id": 1, "file_name": "c.png"}])
        Image.fromarray(pixels).save(tmp_path / "d" / "c.png")
        dataset = read_coco(images, annotations)
        image, _ = TrainingImages(dataset, spec, PLAIN)[0]
        np.testing.assert_array_equal(image, EvaluationImages(dataset, spec)[0][1].pixels)
        np.testing.assert_array_equal(image, detector_pixels(decode(tmp_path / "d" / "c.png"), spec).pixels)


def test_an_object_without_a_mask_has_its_box_for_one(tmp_path):
    triangle = [[12, 9, 36, 9, 36, 27]]
    outside = [[200, 200, 220, 200, 220, 220]]
    annotations = [box(12, 9, 24, 18, segmentation=one) for one in (triangle, [], outside)]
    dataset = read_coco(*write(tmp_path / "d", annotations), masks=True)
    items = TrainingImages(dataset, SPEC, PLAIN, masks=True)
    (_, target), (_, empty) = items[0], items[1]
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].shape == (3, 60, 80)
    rectangle = torch.zeros((60, 80), dtype=torch.uint8)
    rectangle[6:18, 8:24] = 1
    assert torch.equal(target["masks"][1], rectangle)
    assert torch.equal(target["masks"][2], rectangle)
    assert target["masks"][0].sum() == pytest.approx(rectangle.sum().item() / 2, abs=12)
    assert empty["masks"].shape == (0, 60, 80)


def test_a_size_that_contradicts_the_annotations_is_an_error(tmp_path):
    images = [{"id": 1, "file_name": "a.png", "width": 90, "height": 120}]
    dataset = read_coco(*write(tmp_path / "d", images=images))
    with pytest.raises(InputError, match="is 120x90 upright, but its annotations say 90x120"):
        EvaluationImages(dataset, SPEC)[0]


def test_aspect_ratios_come_from_the_annotations_or_the_header(tmp_path):
    images = [{"id": 1, "file_name": "a.png", "width": 300, "height": 100}]
    names = ("b.png", "turned.jpg", "turned.png", "magick.png")
    images += [{"id": i + 2, "file_name": name} for i, name in enumerate(names)]
    root, annotations = write(tmp_path / "d", images=images)
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = PngInfo()  # as ImageMagick writes it
    profile.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n")
    for name in names[1:]:
        how = {"pnginfo": profile} if name == "magick.png" else {"exif": exif}
        Image.new("RGB", (120, 90)).save(tmp_path / "d" / name, **how)
        assert upright_size(tmp_path / "d" / name) == (decode(tmp_path / "d" / name).size[::-1], 6)
    assert aspect_ratios(read_coco(root, annotations)) == [3, 120 / 90, 90 / 120, 90 / 120, 90 / 120]
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match="broken.jpg cannot be read"):
        upright_size(tmp_path / "broken.jpg")


def test_batches_are_in_the_order_asked_for_and_the_same_for_any_number_of_workers(tmp_path):
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in range(6)]
    root, annotations = write(tmp_path / "d", [box(10, 10, 40, 30, image=i) for i in range(6)], images=images)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(tmp_path / "d" / f"{i}.png")
    dataset = read_coco(root, annotations)
    augment = DetectionAugment(0.5, 0.5, 0.2, 0.5, seed=4, scale_jitter=(0.5, 2.0), min_sizes=(40, 60), mosaic=0.5)
    order = [5, 0, 3, 1, 4]
    augment.epoch = 2
    items = TrainingImages(dataset, SPEC, augment)
    alone = [items[i] for i in order]
    for workers in (0, 2):
        batches = list(create_loader(items, 2, workers, order))
        assert [len(images) for images, _ in batches] == [2, 2, 1]
        assert all(len(batch) == 2 for batch in batches)
        seen = [(image, target) for images, targets in batches for image, target in zip(images, targets, strict=True)]
        for (image, target), (expected, boxes) in zip(seen, alone, strict=True):
            assert torch.equal(image, expected)
            assert torch.equal(target["boxes"], boxes["boxes"])
    augment.epoch = 3
    assert not all(torch.equal(items[i][0], image) for i, (image, _) in zip(order, alone, strict=True))
    ids = [image_id for ids, _ in create_loader(EvaluationImages(dataset, SPEC), 4, 0) for image_id in ids]
    assert ids == list(range(6))
    assert create_loader(items, 4, 8).num_workers == 2


def test_real_images_and_masks_go_through_everything():
    root = real("coco_ccby")
    dataset = read_coco(str(root / "images"), str(root / "instances_val.json"), masks=True)
    augment = DetectionAugment(0.5, 0.0, 0.2, 0.5, seed=0, scale_jitter=(0.3, 1.7), mosaic=0.3)
    items = TrainingImages(dataset, DetectorPreprocess(min_size=128, max_size=214), augment, masks=True)
    objects = 0
    for i in range(0, 45, 3):
        image, target = items[i]
        assert max(image.shape) <= 214
        assert target["masks"].shape == (len(target["labels"]), *image.shape[:2])
        for (x1, y1, x2, y2), mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            inside = mask[max(0, int(y1) - 2) : int(y2) + 3, max(0, int(x1) - 2) : int(x2) + 3]
            assert inside.sum() == mask.sum()  # no pixel of the mask beside its box
        objects += len(target["labels"])
    assert objects > 30
