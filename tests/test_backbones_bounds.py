"""Hostile pictures: each is refused or decoded within bounds of time and memory, measured in a process of its own."""

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, TiffImagePlugin

from backbones.bounds import check_exif
from backbones.preprocess import MAX_PIXELS, ImageError, decode

MB = 1 << 20
SIDE = int(MAX_PIXELS**0.5)
SECONDS = 2.0  # of CPU time
BYTES = 9 * MAX_PIXELS  # two pictures of the most pixels, and what is small


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def small(kind: str) -> bytes:
    return encoded(Image.new("RGB", (10, 10)), kind)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *extra: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def zeros(size: int) -> bytes:
    """So many of them, compressed; their checksum is known without making them."""
    block, rest = zlib.compressobj(9, zlib.DEFLATED, -15), zlib.compressobj(9, zlib.DEFLATED, -15)
    megabyte = block.compress(bytes(1 << 20)) + block.flush(zlib.Z_FULL_FLUSH)
    end = rest.compress(bytes(size % (1 << 20))) + rest.flush()
    return b"\x78\x9c" + megabyte * (size >> 20) + end + struct.pack(">I", (size % 65521) << 16 | 1)


def in_jpeg(segments: bytes) -> bytes:
    """Before all others of a small file."""
    return b"\xff\xd8" + segments + small("JPEG")[2:]


def in_gif(blocks: bytes) -> bytes:
    body = small("GIF")
    start = body.index(b"\x2c")
    return body[:start] + blocks + body[start:]


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data


def progressive(side: int, scans: int) -> bytes:
    body = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    return body[:-2] + body[body.rindex(b"\xff\xda") : -2] * scans + b"\xff\xd9"


def planar(side: int, scans: int) -> bytes:
    """Not progressive, and each scan of one component, so that the decoder reads them all."""
    gray = encoded(Image.new("L", (side, side)), "JPEG")
    frame, scan = gray.index(b"\xff\xc0"), gray.index(b"\xff\xda")
    length = 2 + int.from_bytes(gray[frame + 2 : frame + 4], "big")
    colours = struct.pack(">BHHB", 8, side, side, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    pixels = gray[scan + 10 : -2]
    each = [segment(0xDA, bytes([1, 1 + i % 3, 0, 0, 63, 0])) + pixels for i in range(scans)]
    return gray[:frame] + segment(0xC0, colours) + gray[frame + length : scan] + b"".join(each) + b"\xff\xd9"


def tiff(tags: list[tuple[int, int, int, int | None]], data: bytes = b"") -> bytes:
    """Tags as number, type, count and value; None is the place of the data behind them."""
    place = 14 + 12 * len(tags)
    entries = [struct.pack("<HHII", *tag[:3], place if tag[3] is None else tag[3]) for tag in sorted(tags)]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + data


def overlapping(tags: int, size: int) -> bytes:
    """Values that all are the same bytes, each of which is to be copied."""
    return tiff([(1000 + i, 7, size, None) for i in range(tags)], bytes(size))


def parts(data: bytes, size: int = 65_000) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def bmp_runs(side: int, runs: bytes) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 2, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 62) + header + bytes(8) + runs


def webp_canvas(side: int) -> bytes:
    """An animation that says it has this canvas."""
    frames = [Image.new("RGB", (16, 16), (90 * i, 0, 0)) for i in range(2)]
    body = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    place = body.index(b"VP8X") + 12
    body[place : place + 6] = 2 * (side - 1).to_bytes(3, "little")
    return bytes(body)


HOSTILE: dict[str, tuple[Callable[[], bytes], str | None]] = {  # what is said of each; None where it is decoded
    "PNG as large as may be": (lambda: png(SIDE, SIDE, zeros(SIDE * (3 * SIDE + 1))), None),
    "PNG, 16 bits and alpha": (lambda: png(SIDE, SIDE, zeros(SIDE * (8 * SIDE + 1)), depth=16, colour=6), None),
    "PNG, 16 bits gray": (lambda: png(SIDE, SIDE, zeros(SIDE * (2 * SIDE + 1)), depth=16, colour=0), None),
    "PNG with a row too many": (lambda: png(SIDE, SIDE + 1, b""), f"over the limit of {MAX_PIXELS}"),
    "PNG with 10 GB of pixels": (lambda: png(10, 10, zeros(10 << 30)), None),
    "PNG, a profile of 1 GB": (lambda: png(10, 10, b"", chunk(b"iCCP", b"a\0\0" + zeros(1 << 30))), "too large"),
    "PNG, text of 1 GB": (lambda: png(10, 10, b"", chunk(b"zTXt", b"a\0\0" + zeros(1 << 30))), "too large"),
    "PNG, a million chunks": (lambda: png(10, 10, b"", chunk(b"abCd", b"") * 1_000_000), "too many parts"),
    "PNG, a million pieces of pixels": (
        lambda: png(10, 10, b"", chunk(b"IDAT", b"") * 1_000_000),
        "too many parts",
    ),
    "PNG, EXIF overlapping": (
        lambda: png(10, 10, zeros(310), chunk(b"eXIf", overlapping(40_000, 500_000))),
        "EXIF block claims more",
    ),
    "JPEG as large as may be": (lambda: encoded(Image.new("RGB", (SIDE, SIDE)), "JPEG", quality=5), None),
    "JPEG, a thousand scans": (lambda: progressive(2000, 1000), "it has 1010 scans"),
    "JPEG, many small scans": (lambda: progressive(100, 20_000), None),
    "JPEG, planar, 300 scans": (lambda: planar(3000, 300), "it has 300 scans"),
    "JPEG, a million segments": (lambda: in_jpeg(segment(0xE2, b"") * 1_000_000), "too many parts"),
    "JPEG, 5 MB of fill": (lambda: in_jpeg(b"\xff" * 5_000_000), "too many parts"),
    "JPEG, EXIF in small pieces": (lambda: in_jpeg(segment(0xE1, b"Exif\0\0AA") * 400_000), "too many parts"),
    "JPEG, EXIF in large pieces": (
        lambda: in_jpeg(segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 300),
        "too many parts",
    ),
    "JPEG, EXIF overlapping in pieces": (
        lambda: in_jpeg(b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts(overlapping(40_000, 500_000)))),
        "EXIF block claims more",
    ),
    "GIF, a comment of 5 MB": (lambda: in_gif(b"\x21\xfe" + (b"\xff" + b"a" * 255) * 20_000 + b"\0"), "many parts"),
    "GIF, a million comments": (lambda: in_gif(b"\x21\xfe\x01a\0" * 1_000_000), "too many parts"),
    "GIF, 5 MB of junk": (lambda: in_gif(b"\x01" * 5_000_000), "too many parts"),
    "WebP as large as may be": (lambda: webp_canvas(int((MAX_PIXELS // 2) ** 0.5)), None),
    "WebP, larger": (lambda: webp_canvas(SIDE), f"over the limit of {MAX_PIXELS // 2}"),
    "BMP, empty runs": (lambda: bmp_runs(SIDE, b"\1\0" * 1_000_000), "too many parts"),
    "TIFF, its values overlapping": (
        lambda: tiff([(256, 4, 1, 9), (257, 4, 1, 9), *[(500 + i, 2, MB, None) for i in range(999)]], bytes(MB)),
        "too many parts",
    ),
    "PPM, a header of blanks": (lambda: b"P6" + b" " * 5_000_000 + b"10 10 255\n" + bytes(300), "too many parts"),
}  # fmt: skip

CHILD = """
import json, sys, time
from pathlib import Path
from backbones.preprocess import ImageError, decode

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

for path in sorted(Path(sys.argv[1]).iterdir()):
    body = path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = peak(), time.process_time()
    said = None
    try:
        decode(body)
    except ImageError as error:
        said = str(error)
    print(json.dumps([path.name, said, time.process_time() - began, peak() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str | None, float, int]]:
    """What was said of each, the seconds of CPU time that it took, and the bytes."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("a process's peak memory is Linux's to tell")
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "0").write_bytes(small("JPEG"))  # the first pays for what is loaded
    for name, (make, _) in HOSTILE.items():
        (folder / name).write_bytes(make())
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        stdout=subprocess.PIPE, text=True, timeout=300, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert child.returncode == 0
    return {name: (said, seconds, size) for name, said, seconds, size in map(json.loads, child.stdout.splitlines())}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_cost_little(name: str, measured: dict[str, tuple[str | None, float, int]]) -> None:
    said, seconds, size = measured[name]
    expected = HOSTILE[name][1]
    assert (said is None) == (expected is None), said
    assert expected is None or expected in str(said)
    assert seconds < SECONDS
    assert size < (BYTES if expected is None else 100_000_000)


def test_what_real_files_hold_is_within_the_bounds() -> None:
    photo = Image.effect_noise((640, 480), 60).convert("RGB")
    profile = bytes(255 * 65_519)  # as many pieces as there can be
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.MakerNote] = bytes(60_000)
    for options in ({"icc_profile": profile}, {"exif": exif}, {"progressive": True, "comment": bytes(60_000)}):
        assert decode(encoded(photo, "JPEG", **options)).size == ((480, 640) if "exif" in options else (640, 480))
    pixels = zlib.compress(b"".join(b"\0" + bytes(3 * 4000) for _ in range(4000)), 0)
    pieces = [chunk(b"IDAT", part) for part in parts(pixels, 4096)]  # 48 MB
    body = png(4000, 4000, b"", *pieces)
    assert decode(body.replace(chunk(b"IDAT", b""), b"")).size == (4000, 4000)
    pages = [Image.new("RGB", (100, 100), (i, 0, 0)) for i in range(50)]
    assert decode(encoded(pages[7], "TIFF", save_all=True, append_images=pages)).getpixel((0, 0)) == (7, 0, 0)
    assert decode(encoded(pages[7], "GIF", save_all=True, append_images=pages)).size == (100, 100)


def test_exif_whose_values_share_bytes() -> None:
    with pytest.raises(ValueError, match="claims more"):
        check_exif(2 * b"Exif\0\0" + overlapping(100, 5000))  # Pillow takes off any number
    for kind, size in TiffImagePlugin.ImageFileDirectory_v2._load_dispatch.items():
        with pytest.raises(ValueError, match="claims more"):
            check_exif(tiff([(1000 + i, kind, 5000 // size[0], None) for i in range(100)], bytes(5000)))
    check_exif(overlapping(3, 5000))
    check_exif(tiff([(1000 + i, 7, 5000 + i, 2**31) for i in range(100)]))  # beyond its end: Pillow reads none
    for cut in range(40):
        check_exif(overlapping(100, 5000)[:cut])


def test_formats_that_start_programs_or_are_rare_are_not_read() -> None:
    for kind in ("EPS", "ICO", "PCX", "TGA", "SGI", "PDF", "ICNS", "JPEG2000", "DDS"):
        with pytest.raises(ImageError, match="no image format that is read here"):
            decode(encoded(Image.new("RGB", (32, 32)), kind))
