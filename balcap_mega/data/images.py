"""Encoded image files to upright RGB pictures on white, by PIL or by DALI, with the same pixels."""

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from balcap_mega.data.headers import DAMAGED, MOST_KEPT_PIXELS, Header, Unreadable, read_header, shrunk_size

# Of `Header.orientation`, as Exif defines them.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PHOTOMETRIC, BITS_PER_SAMPLE = 262, 258  # tags of TIFF


class ImageDecoder(Protocol):
    """Decodes a batch of image files: upright RGB pictures, None for a file that `why_unreadable` has words for."""

    def __call__(self, encoded: Sequence[bytes]) -> list[Image.Image | None]: ...


def decode(data: bytes) -> Image.Image:
    """The picture, upright, RGB, transparency on white, 16 bits a channel scaled to 8. Of several, the first.

    One of more than MOST_KEPT_PIXELS is shrunk to that: a JPEG while it is decoded. Raises Unreadable.
    """
    header = read_header(data)
    image = header.image
    try:
        if header.reduction > 1:
            image.draft(None, (header.size[0] // header.reduction, header.size[1] // header.reduction))
        image.load()
    except DAMAGED as error:
        what = "is cut short" if "truncated" in str(error) else "is damaged"
        raise Unreadable(f"{what}: {' '.join(str(error).split())[:200]}") from None
    try:
        picture = _rgb(image)
    except DAMAGED:
        raise Unreadable(f"has colours of the kind {image.mode}, which are not read here") from None
    return shrink(_turned(picture, header), MOST_KEPT_PIXELS)


def why_unreadable(data: bytes) -> str | None:
    """In words that go on from the file's name; None for a picture that is read."""
    try:
        decode(data)
    except Unreadable as error:
        return str(error)
    return None


class PilDecoder:
    """Decodes one by one with PIL."""

    def __call__(self, encoded: Sequence[bytes]) -> list[Image.Image | None]:
        return [_decoded(data) for data in encoded]


class DaliDecoder:
    """Decodes batches with NVIDIA DALI, on the CPU, where the pixels are exactly PIL's.

    What DALI does not read as PIL does (transparency, 16 bits, animations, formats that it has not) goes to PIL, and so
    does a batch with a damaged file, for DALI refuses such a batch as a whole. Pictures are turned by what PIL says.
    Several threads may share it: they take turns at the pipeline, which has threads of its own.
    """

    def __init__(self, batch_size: int = 32, threads: int = 2):
        self._batch_size, self._threads = batch_size, threads
        self._turn = threading.Lock()
        self._pipeline = self._build()

    def _build(self):
        from nvidia.dali import fn, pipeline_def, types  # 1 s, and only this decoder needs it

        @pipeline_def(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=None,
            prefetch_queue_depth=1,
        )
        def decode_files():
            files = fn.external_source(name="files", no_copy=True)
            return fn.decoders.image(
                files,
                device="cpu",
                output_type=types.RGB,  # pyright: ignore[reportAttributeAccessIssue] (DALI adds it on import)
                jpeg_fancy_upsampling=True,
                adjust_orientation=False,
            )

        pipeline = decode_files()
        pipeline.build()
        return pipeline

    def __call__(self, encoded: Sequence[bytes]) -> list[Image.Image | None]:
        pictures: list[Image.Image | None] = [None] * len(encoded)
        for_dali: list[tuple[int, Header]] = []
        for index, data in enumerate(encoded):
            try:
                header = read_header(data)
            except Unreadable:
                continue
            if _is_plain(header, data):
                for_dali.append((index, header))
            else:
                pictures[index] = _decoded(data)
        for start in range(0, len(for_dali), self._batch_size):
            batch = for_dali[start : start + self._batch_size]
            for (index, _), picture in zip(batch, self._decode_batch([(encoded[i], header) for i, header in batch])):
                pictures[index] = picture
        return pictures

    def _decode_batch(self, files: list[tuple[bytes, Header]]) -> list[Image.Image | None]:
        with self._turn:
            try:
                self._pipeline.feed_input("files", [np.frombuffer(data, np.uint8) for data, _ in files])
                (decoded,) = self._pipeline.run()
            except RuntimeError:
                self._pipeline = self._build()  # a pipeline that failed cannot run again
                return [_decoded(data) for data, _ in files]
            pixels = [np.array(decoded[i]) for i in range(len(files))]  # copied: the next run writes over them
        return [_turned(Image.fromarray(array), header) for array, (_, header) in zip(pixels, files, strict=True)]


def _is_plain(header: Header, data: bytes) -> bool:
    """Whether DALI decodes it to PIL's pixels: 8 bits a channel, nothing transparent, one picture, not too big."""
    image = header.image
    deep = image.format == "PNG" and data[24] > 8
    return (
        image.format in ("JPEG", "MPO", "PNG", "WEBP", "BMP")
        and image.mode in ("1", "L", "RGB", "P", "CMYK")
        and not (deep or image.has_transparency_data)
        and (image.format == "MPO" or not getattr(image, "is_animated", False))
        and header.size[0] * header.size[1] <= MOST_KEPT_PIXELS
    )


def _decoded(data: bytes) -> Image.Image | None:
    try:
        return decode(data)
    except Unreadable:
        return None


def _turned(picture: Image.Image, header: Header) -> Image.Image:
    return picture.transpose(TURNS[header.orientation]) if header.orientation in TURNS else picture


def _rgb(image: Image.Image) -> Image.Image:
    """Raises ValueError for colours that have no such picture."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _grey(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits: whole numbers by the bits that the file says they have, fractions from 0 to 1."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        most = 1.0
    else:
        bits = int(np.max(tags.get(BITS_PER_SAMPLE, 16)))
        if bits > 16:
            raise ValueError(f"{bits} bits")
        most = 2.0**bits - 1
    if not (values.min() >= 0 and values.max() <= most):  # NaN, too
        raise ValueError("of no known range")
    grey = np.rint(values * (255.0 / most))
    transparent = image.info.get("transparency")
    grey[values == transparent] = 255
    if tags.get(PHOTOMETRIC) == 0:  # white is 0, which PIL minds at 8 bits only
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def shrink(image: Image.Image, most_pixels: int) -> Image.Image:
    """The picture in its shape with at most that many pixels; a smaller one as it is."""
    size = shrunk_size(image.size, most_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)  # as the models' processors
