import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from shared_data import real
from timm.data import create_transform
from torchvision import transforms

from backbones.engine import normalize
from backbones.preprocess import (
    ClassifierPreprocess,
    DetectorPreprocess,
    ImageError,
    canvas_size,
    classifier_pixels,
    decode,
    detector_pixels,
    fitted_size,
    stack,
)

SIZES = [(500, 375), (375, 500), (333, 500), (64, 64), (300, 299), (97, 640), (1024, 31)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_torchvision(size, interpolation):
    spec = ClassifierPreprocess(resize=72, crop=64, interpolation=interpolation)
    mode = transforms.InterpolationMode(interpolation)
    reference = transforms.Compose([transforms.Resize(72, mode), transforms.CenterCrop(64)])
    image = picture(*size)
    np.testing.assert_array_equal(classifier_pixels(image, spec), np.asarray(reference(image)))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_and_normalisation_equal_timm(size):
    spec = ClassifierPreprocess(resize=288, crop=256, interpolation="bilinear")
    reference = create_transform((3, 256, 256), interpolation="bilinear", crop_pct=0.887, normalize=True)
    image = picture(*size)
    ours = normalize(torch.from_numpy(classifier_pixels(image, spec)[None].copy()), spec)[0]
    torch.testing.assert_close(ours, reference(image), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_pixels_equal_torchvision_on_real_images():
    paths = sorted((real("imagenette") / "val").rglob("*.JPEG"))
    assert len(paths) == 500
    spec = ClassifierPreprocess(resize=256, crop=224)
    reference = transforms.Compose(
        [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    for path in paths[::5]:
        with Image.open(path) as image:
            expected = np.asarray(reference(image.convert("RGB")))
        np.testing.assert_array_equal(classifier_pixels(decode(path), spec), expected)


def test_every_kind_of_file_becomes_upright_rgb():
    image = picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for kind, bytes_ in {
        "gray": encoded(image.convert("L"), "JPEG"),
        "CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "palette": encoded(image.convert("P"), "PNG"),
        "transparent": encoded(image.convert("RGBA"), "PNG"),
        "1 bit": encoded(image.convert("1"), "PNG"),
        "16 bit": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54), "PNG"),
    }.items():
        decoded = decode(bytes_)
        assert (decoded.mode, decoded.size) == ("RGB", (40, 30)), kind
    assert decode(encoded(image, "JPEG", exif=exif)).size == (30, 40)


def test_sixteen_bits_keep_their_brightness():
    deep = Image.fromarray(np.full((4, 4), 200 * 257, dtype=np.uint16))
    assert np.asarray(decode(encoded(deep, "PNG"))).tolist() == [[[200] * 3] * 4] * 4


def huge_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is empty"),
        (b"<html>no</html>", "cannot be decoded"),
        (encoded(picture(64, 64), "JPEG")[:300], "cannot be decoded"),
        (encoded(picture(64, 64), "PNG")[:500], "cannot be decoded"),
        (huge_png(20_000, 20_000), "limit of 89478485"),
        (huge_png(10_001, 10_000), "limit of 89478485"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot be decoded"),
    ],
)
def test_bad_images_are_refused_in_a_line(body, message):
    with pytest.raises(ImageError, match=message) as error:
        decode(body)
    assert "\n" not in str(error.value)


def test_missing_file_and_thin_image(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="too long and thin"):
        classifier_pixels(Image.new("RGB", (30_000, 1)), ClassifierPreprocess(resize=256, crop=224))


@pytest.mark.parametrize(("h", "w"), [(480, 640), (640, 480), (426, 640), (100, 2000), (1, 3000)])
def test_fitted_size_follows_torchvision_rule(h, w):
    spec = DetectorPreprocess(min_size=800, max_size=1333)
    height, width = fitted_size(h, w, spec)
    assert min(height, width) <= 800
    assert max(height, width) <= 1333
    assert 800 in (height, width) or 1333 in (height, width)
    assert height / width == pytest.approx(h / w, rel=0.01) or min(height, width) < 50


def test_boxes_return_to_the_original():
    fitted = detector_pixels(picture(640, 480), DetectorPreprocess(min_size=300, max_size=320))
    assert fitted.pixels.shape == (240, 320, 3)
    boxes = np.array([[0, 0, 320, 240], [10, 20, 30, 40]], np.float32)
    np.testing.assert_allclose(fitted.to_original(boxes), [[0, 0, 640, 480], [20, 40, 60, 80]])


def test_stack_pads_at_the_right_and_bottom():
    images = [np.full((100, 120, 3), 7, np.uint8), np.full((90, 128, 3), 9, np.uint8)]
    assert canvas_size(images[0], 128) == (128, 128)
    batch, sizes = stack(images, 128)
    assert batch.shape == (2, 128, 128, 3)
    assert sizes.tolist() == [[100, 120], [90, 128]]
    assert batch[0, :100, :120].min() == 7
    assert batch[0, 100:].max() == batch[0, :, 120:].max() == 0


def test_specs_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="crop 224 is larger than resize 200"):
        ClassifierPreprocess(resize=200, crop=224)
    with pytest.raises(ValueError, match="no multiple of 32"):
        DetectorPreprocess(min_size=64, max_size=64, divisor=100)
