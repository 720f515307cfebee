import io
import struct
import warnings
import zlib
from typing import get_args

import cv2
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin
from shared_data import real
from timm.data import create_transform
from torchvision import transforms

from backbones.engine import normalize
from backbones.preprocess import (
    ClassifierPreprocess,
    Decoder,
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


PROTOCOLS = [(256, 224, "bicubic", 0.875), (288, 256, "bilinear", 0.887), (269, 256, "bicubic", 0.95)]


def check_against_others(images) -> None:
    """Pairs (our picture, the same as torchvision's and timm's data sets open it) give equal pixels."""
    references = []
    for resize, crop, interpolation, share in PROTOCOLS:
        resized = transforms.Resize(resize, transforms.InterpolationMode(interpolation))
        timms = create_transform((3, crop, crop), interpolation=interpolation, crop_pct=share, normalize=False)
        spec = ClassifierPreprocess(resize=resize, crop=crop, interpolation=interpolation)
        references.append((spec, transforms.Compose([resized, transforms.CenterCrop(crop)]), timms))
    for i, (ours, theirs) in enumerate(images):
        spec, torchvisions, timms = references[i % len(references)]
        pixels = classifier_pixels(ours, spec)
        np.testing.assert_array_equal(pixels, np.asarray(torchvisions(theirs)), f"torchvision, image {i}, {spec}")
        np.testing.assert_array_equal(pixels, timms(theirs).permute(1, 2, 0).numpy(), f"timm, image {i}, {spec}")


def test_pixels_equal_torchvision_and_timm_on_odd_sizes():
    sizes = np.random.default_rng(0).integers(20, 700, (30, 2)).tolist()
    check_against_others((image, image) for image in (picture(w, h, w) for w, h in sizes))


@pytest.mark.slow
def test_pixels_equal_torchvision_and_timm_on_real_images():
    paths = sorted(real("imagenette").rglob("*.JPEG"))
    paths = paths[:: max(1, len(paths) // 1000)][:1000]
    assert len(paths) > 500
    check_against_others((decode(path), Image.open(path).convert("RGB")) for path in paths)


def test_sixteen_bits_keep_their_brightness():
    deep = Image.fromarray(np.full((4, 4), 200 * 257, dtype=np.uint16))
    assert np.asarray(decode(encoded(deep, "PNG"))).tolist() == [[[200] * 3] * 4] * 4


def integers(kind: str, samples: np.ndarray) -> bytes:
    if kind == "PPM":
        return b"P5\n%d %d\n65535\n" % samples.shape[::-1] + samples.astype(">u2").tobytes()
    return encoded(Image.fromarray(samples), kind)


@pytest.mark.parametrize(
    ("kind", "bits", "expected"),
    [
        ("PNG", np.uint16, [0, 0, 0, 1, 117, 255]),
        ("TIFF", np.uint16, [0, 0, 0, 1, 117, 255]),
        ("PPM", np.uint16, [0, 0, 0, 1, 117, 255]),
        ("TIFF", np.int32, [0, 100, 255, 255, 255, 255]),  # what Pillow makes of it
    ],
)
def test_integers_are_shifted_where_they_have_sixteen_bits(kind, bits, expected):
    samples = np.array([[0, 100, 255, 256, 30_000, 65_535]], dtype=bits)
    assert np.asarray(decode(integers(kind, samples)))[0].tolist() == [[value] * 3 for value in expected]


def test_sixteen_bit_png_in_the_mode_of_other_versions_of_pillow(monkeypatch):
    monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
    body = integers("PNG", np.array([[0, 100, 256, 65_535]], dtype=np.uint16))
    assert Image.open(io.BytesIO(body)).mode == "I"
    assert np.asarray(decode(body))[0, :, 0].tolist() == [0, 0, 1, 255]


def sixteen_bit_colour() -> bytes:
    deep = np.asarray(picture(40, 30)).astype(np.uint16) * 257
    return bytes(cv2.imencode(".png", deep[..., ::-1])[1])


def palette_with_transparency() -> bytes:
    image = picture(40, 30).quantize(16)
    return encoded(image, "PNG", transparency=bytes(range(0, 256, 16)))


def without_adobe_marker(body: bytes) -> bytes:
    start = body.index(b"\xff\xee")
    return body[:start] + body[start + 2 + int.from_bytes(body[start + 2 : start + 4], "big") :]


CMYK = encoded(picture(40, 30).convert("CMYK"), "JPEG", quality=98)
DEEP = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54)
KINDS = {
    "JPEG": encoded(picture(41, 30), "JPEG"),
    "progressive": encoded(picture(41, 30), "JPEG", progressive=True, subsampling=1),
    "gray JPEG": encoded(picture(41, 30).convert("L"), "JPEG"),
    "RGB JPEG": encoded(picture(41, 30), "JPEG", keep_rgb=True),
    "CMYK": without_adobe_marker(CMYK),
    "CMYK, inverted as Adobe does": CMYK,
    "PNG": encoded(picture(40, 30), "PNG"),
    "16 bit gray PNG": encoded(DEEP, "PNG"),
    "16 bit gray TIFF": encoded(DEEP, "TIFF"),
    "16 bit colour PNG": sixteen_bit_colour(),
    "palette": encoded(picture(40, 30).quantize(16), "PNG"),
    "palette with transparency": palette_with_transparency(),
    "gray with transparency": encoded(picture(40, 30).convert("L"), "PNG", transparency=7),
    "alpha": encoded(picture(40, 30).convert("RGBA"), "PNG"),
}


@pytest.mark.parametrize("decoder", get_args(Decoder))
@pytest.mark.parametrize("kind", KINDS)
def test_odd_files_are_what_others_make_of_them(kind, decoder):
    """Pixels equal those of `Image.open(…).convert("RGB")`, with which the published accuracies were measured."""
    ours = np.asarray(decode(KINDS[kind], decoder=decoder)).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transparency, which a user of ours is not told
        reference = Image.open(io.BytesIO(KINDS[kind]))
        theirs = np.asarray(reference.convert("RGB")).astype(int)
    if "16 bit gray" in kind:  # Pillow would make nearly all of it white
        theirs = np.asarray(DEEP)[..., None].repeat(3, 2) >> 8
    # Between two JPEG libraries a step of rounding is allowed; there is none in the versions tried.
    assert np.abs(ours - theirs).max() <= ("JPEG" in kind or kind == "progressive")
    if kind.startswith("CMYK"):
        assert np.abs(ours - np.asarray(picture(40, 30))).mean() < 10  # neither inverted nor swapped


@pytest.mark.parametrize("decoder", get_args(Decoder))
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(kind, orientation, decoder):
    upright = picture(48, 32)
    turn = Image.Transpose
    inverse = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
               6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}.get(orientation)  # fmt: skip
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = upright if inverse is None else upright.transpose(inverse)
    decoded = decode(encoded(stored, kind, exif=exif, **({"quality": 98} if kind == "JPEG" else {})), decoder=decoder)
    assert decoded.size == (48, 32)
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(upright)).mean() < (8 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("decoder", ["torchvision", "opencv"])
def test_damaged_jpegs_are_refused_or_decoded_by_every_decoder(decoder, tmp_path):
    whole = encoded(picture(120, 90), "JPEG")
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(60):
        body = bytearray(whole)
        body[rng.integers(20, len(body))] ^= 1 << rng.integers(8)
        if i % 3 == 0:
            body = body[: rng.integers(1, len(body) - 2)]
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(body)
        try:
            expected = decode(path)
        except ImageError:
            refused += 1
            with pytest.raises(ImageError, match=str(path)):
                decode(path, decoder=decoder)
        else:
            assert decode(path, decoder=decoder).size == expected.size
    assert 20 <= refused < 60


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["torchvision", "opencv"])
def test_decoders_drift_on_real_images_is_small(decoder):
    spec = ClassifierPreprocess(resize=256, crop=224)
    drift = []
    for path in sorted((real("imagenette") / "val").rglob("*.JPEG")):
        pixels = [classifier_pixels(decode(path, decoder=name), spec).astype(int) for name in ("pillow", decoder)]
        drift.append(np.abs(pixels[0] - pixels[1]).max())
    assert max(drift) <= 2  # 0 with Pillow 12.3, torchvision 0.29.2 and OpenCV 5.0


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
        (huge_png(20_000, 20_000), "limit of 64000000"),
        (huge_png(10_001, 10_000), "limit of 64000000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot be decoded"),
    ],
)
@pytest.mark.parametrize("decoder", get_args(Decoder))
def test_bad_images_are_refused_in_a_line(tmp_path, body, message, decoder):
    path = tmp_path / "named.jpg"
    path.write_bytes(body)
    with pytest.raises(ImageError, match=message) as error:
        decode(body, decoder=decoder)
    assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match=f"^{path} ") as error:
        decode(path, decoder=decoder)
    assert "\n" not in str(error.value)


def test_missing_file_and_thin_image(tmp_path):
    for decoder in get_args(Decoder):
        with pytest.raises(ImageError, match="none.jpg does not exist"):
            decode(tmp_path / "none.jpg", decoder=decoder)
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
