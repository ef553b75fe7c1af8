"""Encoded image files to upright RGB pictures, by PIL or by DALI, with the same pixels."""

import io
import math
import struct
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

# A picture of more pixels than this is taken for a decompression bomb: 100 MB of RGB decode to far more than any model
# or judge looks at. It is refused from its header, before any pixel is decoded.
MOST_PIXELS = 2**25
# Longer side over shorter side. Qwen's own processor refuses more, and one that makes the shorter side of every picture
# the same would blow a line of pixels up to terabytes.
MOST_OBLONG = 200
# Of one JPEG. Encoders write ten or so; a few bytes a scan make a decoder go over all pixels once more.
MOST_SCANS = 64
START_OF_SCAN = b"\xff\xda"
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
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


class ImageDecoder(Protocol):
    """Decodes a batch of image files: upright RGB pictures, None for a file that is corrupt, foreign or a bomb."""

    def __call__(self, encoded: Sequence[bytes]) -> list[Image.Image | None]: ...


class PilDecoder:
    """Decodes one by one with PIL."""

    def __call__(self, encoded: Sequence[bytes]) -> list[Image.Image | None]:
        return [_decode(data) for data in encoded]


class DaliDecoder:
    """Decodes batches with NVIDIA DALI, on the CPU, where the pixels are exactly PIL's.

    What DALI does not read as PIL does (GIF, 16-bit) goes to PIL, and so does a batch with a damaged file, for DALI
    refuses such a batch as a whole.
    """

    def __init__(self, batch_size: int = 32, threads: int = 2):
        self._batch_size, self._threads = batch_size, threads
        self._pipeline = self._build()

    def _build(self):
        from nvidia.dali import fn, pipeline_def, types  # 1 s, and only this decoder needs it

        @pipeline_def(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=None,
            prefetch_queue_depth=1,
        )
        def decode():
            files = fn.external_source(name="files", no_copy=True)
            return fn.decoders.image(files, device="cpu", output_type=types.RGB, jpeg_fancy_upsampling=True)

        pipeline = decode()
        pipeline.build()
        return pipeline

    def __call__(self, encoded: Sequence[bytes]) -> list[Image.Image | None]:
        pictures: list[Image.Image | None] = [None] * len(encoded)
        for_dali = []
        for index, data in enumerate(encoded):
            header = _open(data)
            if header is not None and header.format != "GIF" and not header.mode.startswith("I"):
                for_dali.append(index)
            elif header is not None:
                pictures[index] = _decode(data)
        for start in range(0, len(for_dali), self._batch_size):
            batch = for_dali[start : start + self._batch_size]
            for index, picture in zip(batch, self._decode_batch([encoded[index] for index in batch])):
                pictures[index] = picture
        return pictures

    def _decode_batch(self, encoded: list[bytes]) -> list[Image.Image | None]:
        try:
            self._pipeline.feed_input("files", [np.frombuffer(data, np.uint8) for data in encoded])
            (decoded,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = self._build()  # a pipeline that failed cannot run again
            return [_decode(data) for data in encoded]
        return [Image.fromarray(np.array(decoded[index])) for index in range(len(encoded))]


def _open(data: bytes) -> Image.Image | None:
    """The image with only its header read; None if that is not one of FORMATS, or of a picture no one should decode."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except DAMAGED:
        return None
    short, long = sorted(image.size)
    if not 0 < short <= long <= MOST_OBLONG * short or short * long > MOST_PIXELS:
        return None
    return None if image.format in ("JPEG", "MPO") and data.count(START_OF_SCAN) > MOST_SCANS else image


def _decode(data: bytes) -> Image.Image | None:
    image = _open(data)
    try:
        return None if image is None else ImageOps.exif_transpose(image).convert("RGB")
    except DAMAGED:
        return None


def shrink(image: Image.Image, most_pixels: int) -> Image.Image:
    """The picture in its shape with at most that many pixels; a smaller one as it is."""
    scale = math.sqrt(most_pixels / (image.width * image.height))
    if scale >= 1:
        return image
    size = max(int(image.width * scale), 1), max(int(image.height * scale), 1)
    return image.resize(size, Image.Resampling.BICUBIC)  # as the models' own processors do
