"""Encoded image to the pixels a model sees: the one path that training's evaluation, the artefacts, the
endpoints and batch jobs share. Pillow decodes and resizes; no torch here, unless its decoder is asked for.

Shapes: h, w an image's size; H, W a canvas's; N images in a batch. Pixels are uint8 RGB.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile
from pydantic import Field, model_validator
from typing_extensions import Self

from backbones.bounds import BoundedFile, check_exif, check_scans
from backbones.errors import InputError
from backbones.schema import Section

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64_000_000  # half a gigabyte at the most; ImageNet's and COCO's largest have below 62 million
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that starts another program

_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = npt.NDArray[np.uint8]
Interpolation = Literal["bilinear", "bicubic"]
Decoder = Literal["pillow", "torchvision", "opencv"]
Triple = tuple[float, float, float]


class ImageError(InputError):
    """Bytes that are no image, a broken image, or one that is too large."""


class ClassifierPreprocess(Section):
    """An ImageNet evaluation protocol: resize the short side, crop the centre, normalise.

    `resize` and `crop` are in pixels; `mean` and `std` are of RGB in [0, 1].
    """

    resize: int = Field(ge=1)
    crop: int = Field(ge=1)
    interpolation: Interpolation = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}; make it at most that")
        return self

    def __str__(self) -> str:
        return f"resize {self.resize} {self.interpolation}, centre crop {self.crop}"


class DetectorPreprocess(Section):
    """Resize to a short side of `min_size` unless the long side would pass `max_size`, then pad the
    canvas with zeros (after normalisation) to a multiple of `divisor`. Pixels.
    """

    min_size: int = Field(ge=1)
    max_size: int = Field(ge=1)
    divisor: int = Field(default=128, ge=32)  # 128, the stride of P7, makes anchors exact on every level
    interpolation: Interpolation = "bilinear"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.min_size > self.max_size:
            raise ValueError(f"min_size {self.min_size} is larger than max_size {self.max_size}")
        if self.divisor % 32:
            raise ValueError(f"divisor {self.divisor} is no multiple of 32, the backbones' stride")
        return self

    def __str__(self) -> str:
        return f"short side {self.min_size}, long side at most {self.max_size} {self.interpolation}"


@dataclass(frozen=True)
class Fitted:
    """An image resized for a detector."""

    pixels: Pixels  # [h, w, 3]
    original: tuple[int, int]  # height, width before

    def to_original(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Boxes [K, 4] as x1, y1, x2, y2 of the resized image, in pixels of the original one."""
        (h, w), (oh, ow) = self.pixels.shape[:2], self.original
        scale = np.array([ow / w, oh / h, ow / w, oh / h], dtype=np.float32)
        limit = np.array([ow, oh, ow, oh], dtype=np.float32)
        return np.minimum(boxes * scale, limit)


def decode(source: bytes | str | Path, max_pixels: int = MAX_PIXELS, decoder: Decoder = "pillow") -> Image.Image:
    """An encoded image, or the path of one, as an upright RGB picture.

    Grayscale, palette, CMYK and 16-bit images are converted; EXIF rotation is applied; the size is
    checked in the header, before any pixel is decoded.

    Args:
        decoder: for JPEG files in colour or grayscale; all others, and broken ones, are Pillow's.

    Raises:
        ImageError: no image, a truncated or broken one, or more than `max_pixels`.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    if source == b"":
        raise ImageError("image is empty: send the bytes of a JPEG or PNG file")
    try:
        body = source if isinstance(source, bytes) else Path(source).read_bytes()
        file = BoundedFile(body)
        with Image.open(file, formats=FORMATS) as opened:
            file.begin_pixels()
            limit = max_pixels // 2 if opened.format == "WEBP" else max_pixels  # its decoder holds twice as many
            if opened.width * opened.height > limit:
                size = f"{opened.width}x{opened.height}"
                raise ImageError(f"{name} has {size} pixels, over the limit of {limit}: make it smaller")
            image: Image.Image = opened
            if isinstance(opened, JpegImageFile):
                check_scans(opened, body, file.tell())
                if decoder != "pillow" and opened.format == "JPEG" and opened.mode in ("RGB", "L"):
                    image = _decode_jpeg(body, decoder) or opened
                    image.info = opened.info  # where the EXIF data is
            image.load()
            deep = _is_deep(opened)
            image = _upright(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{name} has more pixels than the limit of {max_pixels}: make it smaller") from None
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except Exception as error:  # decoders raise anything on hostile bytes; each means a bad image
        reason = "no image format that is read here" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"{name} cannot be decoded ({reason}): send a whole JPEG or PNG file") from None
    if image.mode.startswith("I"):  # Pillow would cut off all above 255
        samples = np.array(image)
        if deep:
            samples >>= 8
        image = Image.fromarray(samples.clip(0, 255, out=samples).astype(np.uint8))
        del samples
    image.info.pop("transparency", None)  # it is dropped; of a palette with it Pillow would warn
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says. Pillow's `exif_transpose` would write the EXIF block anew, too."""
    exif, text = image.info.get("exif"), image.info.get("Raw profile type exif")
    if exif is None and text is not None:
        exif = bytes.fromhex("".join(text.split("\n")[3:]))
    check_exif(exif or b"")
    method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if method is None else image.transpose(method)


_HAVE_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # what Pillow reads it from


def upright_size(path: Path) -> tuple[tuple[int, int], int]:
    """Height and width of an image file as `decode` turns it, from its header alone, and its EXIF orientation, 1 to 8.

    Raises:
        ImageError: no image.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            # a PNG's EXIF block may follow its pixels, and Pillow would decode them to look for it
            exif = image.getexif() if image.format != "PNG" or _HAVE_EXIF & image.info.keys() else {}
            orientation = exif.get(ExifTags.Base.Orientation, 1)
            on_its_side = orientation in (5, 6, 7, 8)
            return (image.width, image.height) if on_its_side else (image.height, image.width), orientation
    except Exception as error:  # decoders raise anything on a broken file
        raise ImageError(f"{path} cannot be read ({error}): it is no whole image") from None


def _is_deep(image: ImageFile) -> bool:
    """Whether an integer image has 16 bits a sample, of which the upper eight are kept.

    Pillow's mode `I` holds 16-bit PNG and PPM files in some of its versions, and TIFF files of 16 or of 32 bits.
    """
    if image.mode == "I" and isinstance(image, TiffImageFile):
        return bool(image.tag_v2.get(ExifTags.Base.BitsPerSample) == (16,))
    return image.mode.startswith("I")


def _decode_jpeg(body: bytes, decoder: Decoder) -> Image.Image | None:
    """The picture as it lies in the file, before EXIF rotation; None where it is better left to Pillow."""
    if decoder == "opencv":
        import cv2

        pixels = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        order = "BGR"
        if pixels is None:
            return None
    else:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its deprecation in 0.29; the next versions are not promised
                pixels = decode_jpeg(torch.frombuffer(bytearray(body), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:
            return None
        pixels, order = pixels.permute(1, 2, 0).numpy(), "RGB"  # [3, h, w] -> [h, w, 3]
    h, w = pixels.shape[:2]
    return Image.frombuffer("RGB", (w, h), np.ascontiguousarray(pixels), "raw", order, 0, 1)


def classifier_pixels(image: Image.Image, spec: ClassifierPreprocess) -> Pixels:
    """An upright RGB picture as pixels [crop, crop, 3]; torchvision's `Resize` and `CenterCrop` on Pillow.

    Raises:
        ImageError: so long and thin that its short side cannot be resized within `MAX_PIXELS`.
    """
    resized = classifier_resized(image, spec)
    left = round((resized.width - spec.crop) / 2)
    top = round((resized.height - spec.crop) / 2)
    return np.asarray(resized.crop((left, top, left + spec.crop, top + spec.crop)))


def classifier_resized(image: Image.Image, spec: ClassifierPreprocess) -> Image.Image:
    """An upright RGB picture before its centre is cropped.

    Raises:
        ImageError: as `classifier_pixels` does.
    """
    w, h = image.size
    short = min(w, h)
    size = (spec.resize * w // short, spec.resize * h // short)
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"image of {w}x{h} pixels is too long and thin to resize: crop it first")
    return image.resize(size, resampling(spec.interpolation))


def detector_pixels(image: Image.Image, spec: DetectorPreprocess) -> Fitted:
    """An upright RGB picture resized for a detector."""
    w, h = image.size
    size = fitted_size(h, w, spec)
    resized = image.resize((size[1], size[0]), resampling(spec.interpolation))
    return Fitted(np.asarray(resized), original=(h, w))


def fitted_size(h: int, w: int, spec: DetectorPreprocess) -> tuple[int, int]:
    """The height and width that an image of h x w gets; neither side vanishes."""
    scale = min(spec.min_size / min(h, w), spec.max_size / max(h, w))
    return max(1, round(h * scale)), max(1, round(w * scale))


def canvas_size(pixels: Pixels, divisor: int) -> tuple[int, int]:
    """Height and width of the canvas that an image alone would get."""
    h, w = pixels.shape[:2]
    return -(-h // divisor) * divisor, -(-w // divisor) * divisor


def canvases(spec: DetectorPreprocess) -> tuple[tuple[int, int], ...]:
    """Height and width of every canvas that an image of any shape can get, in order."""
    sizes = [(spec.min_size, long) for long in range(spec.min_size, spec.max_size + 1)]
    sizes += [(short, spec.max_size) for short in range(1, spec.min_size + 1)]
    padded = {(-(-h // spec.divisor) * spec.divisor, -(-w // spec.divisor) * spec.divisor) for h, w in sizes}
    return tuple(sorted(padded | {(w, h) for h, w in padded}))


def stack(images: Sequence[Pixels], divisor: int) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Images [h, w, 3] padded at the right and bottom onto one canvas [N, H, W, 3], and sizes [N, 2] (h, w).

    A picture's detections depend on its canvas, so only images of one `canvas_size` belong together.
    """
    canvases = [canvas_size(image, divisor) for image in images]
    assert len(set(canvases)) == 1, f"images of several canvases in one batch: {canvases}"
    batch = np.zeros((len(images), *canvases[0], 3), dtype=np.uint8)
    for slot, image in zip(batch, images, strict=True):
        slot[: image.shape[0], : image.shape[1]] = image
    return batch, np.array([image.shape[:2] for image in images], dtype=np.int64)


def resampling(interpolation: Interpolation) -> Image.Resampling:
    """Pillow's filter of that name."""
    return Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
