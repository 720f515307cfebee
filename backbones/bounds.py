"""What keeps a hostile image from costing much time or memory as Pillow decodes it; no torch here.

A thread that decodes cannot be stopped, so its work is bounded instead: the pieces of a file, the bytes that its
directories claim, the passes over a JPEG file's pixels. Whatever passes a bound raises ValueError, which says what.
"""

import io
import struct

from PIL.JpegImagePlugin import JpegImageFile

HEADER_READS = 2_000  # of Pillow until it knows a file's size; a JPEG file with an ICC profile in 255 pieces takes 800
PIXEL_READS = 200_000  # until it has the pixels; a PNG file of 20 MB in chunks of 1 KB takes 60 000
REREADS = 4  # times a file's bytes; the directory of a TIFF file is read twice
SCAN_PIXELS = 1_000_000_000  # passes of a JPEG decoder times pixels; encoders make about ten passes
EXIF_PIECES = 16  # of 64 KB

_TIFF_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
}  # bytes, by type


class BoundedFile(io.BytesIO):
    """An encoded image that can be read only so often: Pillow reads each piece of a file by itself, and joins pieces of
    some kinds in quadratic time.
    """

    def __init__(self, body: bytes):
        super().__init__(body)
        self._reads, self._bytes = HEADER_READS, REREADS * len(body) + 65_536
        self._exif: list[bytes] = []

    def begin_pixels(self) -> None:
        """The header has been read."""
        self._reads = PIXEL_READS

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._reads -= 1
        self._bytes -= len(data)
        if self._reads < 0 or self._bytes < 0:
            raise ValueError("it has too many parts")
        if data.startswith(b"Exif\0\0"):  # of a JPEG file: Pillow joins them, and parses them as it opens the file
            self._exif.append(data[6:])
            if len(self._exif) > EXIF_PIECES:
                raise ValueError("it has too many parts")
            check_exif(b"".join(self._exif))
        return data


def check_scans(image: JpegImageFile, body: bytes, read: int) -> None:
    """Refuse a JPEG file whose decoder would pass over its pixels too often.

    Args:
        read: bytes of `body` that it took to open `image`, up to the first scan's pixels.
    """
    of_first = read - 4 - 2 * image.layers  # where the first scan's count of components lies, if it has them all
    if image.format == "JPEG" and "progressive" not in image.info and body[of_first] == image.layers:
        return  # whatever follows is not decoded
    scans = body.count(b"\xff\xda")  # a thumbnail's too, but no compressed pixels by chance
    if scans * image.width * image.height > SCAN_PIXELS:
        raise ValueError(f"it has {scans} scans")


def check_exif(exif: bytes) -> None:
    """Refuse an EXIF block whose values lie one over the other, of which Pillow would copy each."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = "<" if exif[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
    except struct.error:  # Pillow finds none either
        return
    entries = exif[start + 2 : start + 2 + 12 * count]
    copied = 0
    for _, kind, n, offset in struct.iter_unpack(f"{order}HHLL", entries[: len(entries) // 12 * 12]):
        size = n * _TIFF_SIZES.get(kind, 0)
        if offset + size <= len(exif):  # else Pillow stops
            copied += size
    if copied > 4 * len(exif):
        raise ValueError("its EXIF block claims more than it has")
