"""What an image file is, told from its header before any pixel is decoded: its format, size and turn, or why not."""

import io
import re
import struct
from dataclasses import dataclass

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")
# A picture of more pixels than this is taken for a decompression bomb: 200 MB of RGB decode to far more than any model
# or judge looks at. A JPEG can be shrunk while it is decoded, and needs memory for few of its rows at a time; one with
# several scans needs it for all of them.
MOST_PIXELS = 2**26
MOST_JPEG_PIXELS = 2**27
# What is kept of a picture, at most.
MOST_KEPT_PIXELS = 2**25
# Longer side over shorter side. Qwen's own processor refuses more, and one that makes the shorter side of every picture
# the same would blow a line of pixels up to terabytes.
MOST_OBLONG = 200
# Of one JPEG. Encoders write ten or so; a few bytes a scan make a decoder go over all pixels once more.
MOST_SCANS = 64
MOST_SEGMENTS = 2**16
START_OF_SCAN = b"\xff\xda"
ORIENTATION = 0x0112
# What PIL raises on damaged files, by its manual and by trying.
DAMAGED = (
    ArithmeticError,
    Image.DecompressionBombError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)

# What else lies in folders of images, by its first bytes, to be named.
OTHERS = (
    (rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", "HEIC"),
    (rb"....ftyp(avif|avis)", "AVIF"),
    (rb"....ftyp", "a video"),
    (rb"\x1a\x45\xdf\xa3", "a video"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
    (rb"8BPS", "a Photoshop file"),
    (rb"%PDF|%!PS", "a document"),
    (rb"\0\0[\x01\x02]\0", "an icon"),
    (rb"v/1\x01", "OpenEXR"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf", "an archive"),
    (rb"version https://git-lfs", "the pointer of a file in Git LFS"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<svg", "SVG"),
    (rb"\s*<(!doctype html|html|\?xml)", "a web page"),
    (rb"\s*[{\[]", "JSON"),
)


class Unreadable(Exception):
    """Why a file is not read as a picture, in words that go on from its name: "is HEIC, which is not read here"."""


@dataclass(frozen=True)
class Header:
    """An image file opened, not decoded.

    image:       PIL's, lazy
    size:        (width, height) as it is stored, before it is turned upright
    orientation: Exif's, 1 to 8
    reduction:   1, or 2, 4, 8 by which a JPEG is shrunk while it is decoded
    """

    image: Image.Image
    size: tuple[int, int]
    orientation: int
    reduction: int

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) as `balcap_mega.data.images` decodes it."""
        width, height = (-(-side // self.reduction) for side in self.size)
        return shrunk_size((height, width) if self.orientation >= 5 else (width, height), MOST_KEPT_PIXELS)


def read_header(data: bytes) -> Header:
    """Raises Unreadable for what is no picture, and for a picture that no one should decode."""
    if not data:
        raise Unreadable("is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except DAMAGED as error:
        raise Unreadable(_why_not_opened(data, error)) from None
    size = width, height = image.size
    short, long = sorted(size)
    if short < 1:
        raise Unreadable("has no pixels")
    if long > MOST_OBLONG * short:
        raise Unreadable(f"is {width} x {height}, which is longer than {MOST_OBLONG} : 1")
    most, reduction = MOST_PIXELS, 1
    if image.format in ("JPEG", "MPO"):
        scans = count_scans(data)
        most = MOST_JPEG_PIXELS if scans == 1 else MOST_PIXELS
        while short * long > MOST_KEPT_PIXELS * reduction**2 and reduction < 8:
            reduction *= 2
    if short * long > most:
        raise Unreadable(f"has {width} x {height} pixels, more than the {most} that are decoded of such a file")
    try:
        orientation = _orientation(image, data)
    except DAMAGED:
        orientation = 1  # of a picture that is otherwise sound: viewers show it as it lies
    return Header(image, size, orientation, reduction)


def picture_size(data: bytes, most_pixels: int | None = None) -> tuple[int, int]:
    """(width, height) of the picture that a record will hold: upright, shrunk to `most_pixels`. Decodes nothing.

    Raises Unreadable. What only decoding finds out (a file cut short) it does not see.
    """
    size = read_header(data).upright_size
    return size if most_pixels is None else shrunk_size(size, most_pixels)


def shrunk_size(size: tuple[int, int], most_pixels: int) -> tuple[int, int]:
    """`size` in its shape with at most that many pixels; a smaller one as it is. It stays within `MOST_OBLONG`."""
    width, height = size
    scale = (most_pixels / (width * height)) ** 0.5
    if scale >= 1:
        return size
    short, long = sorted((max(int(width * scale), 1), max(int(height * scale), 1)))
    if long > MOST_OBLONG * short:  # whole pixels make of 199 : 1 as much as 399 : 1
        short += 1
        long = min(long, most_pixels // short)
    return (long, short) if width >= height else (short, long)


def count_scans(data: bytes) -> int:
    """The scans of a JPEG, up to its end: what lies behind it (a phone's video, a second picture) is not the picture.

    Raises Unreadable for more than MOST_SCANS.
    """
    at, scans = 2, 0
    for _ in range(MOST_SEGMENTS):
        marker = _MARKER.search(data, at)
        if marker is None or marker[1] == b"\xd9":
            return scans
        at = marker.end()
        if marker[1] == b"\xda":
            scans += 1
            if scans > MOST_SCANS:
                raise Unreadable(f"has more than {MOST_SCANS} scans")
        if marker[1] not in _WITHOUT_LENGTH:
            at += max(int.from_bytes(data[at : at + 2], "big"), 2)
    raise Unreadable("has no end of segments")


_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # 0: a stuffed byte of a scan; d0-d7: a restart within one
_WITHOUT_LENGTH = (b"\xd8", b"\x01")


def _orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "TIFF":
        return 1  # PIL turns it, and says its size upright
    # PNG may have its Exif behind the pixels, and PIL would decode them all to get there.
    exif = image.getexif() if image.format != "PNG" or _ends_with_text(data) else Image.Image.getexif(image)
    value = exif.get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _ends_with_text(png: bytes) -> bool:
    """Whether a chunk that may tell the orientation stands behind the pixels of a PNG."""
    at, pixels = 8, False
    while at + 8 <= len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        pixels |= kind == b"IDAT"
        if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            return True
        if kind == b"IEND":
            return False
        at += length + 12
    return False


def _why_not_opened(data: bytes, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large: {error}"
    head = data[:1024]
    name = next((name for magic, name in OTHERS if re.match(magic, head, re.DOTALL | re.IGNORECASE)), None)
    if name in ("AVIF", "TIFF", "JPEG 2000") and not isinstance(error, Image.UnidentifiedImageError):
        return f"is damaged {name}: {error}"
    if name is not None:
        return f"is {name}, which is not read here"
    if isinstance(error, Image.UnidentifiedImageError):
        return "is of no image format that is read here"
    return f"is damaged: {error}"
