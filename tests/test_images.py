"""Pictures as people have them: transparent, deep, turned, huge, with a video behind them; or why they are not read."""

import io
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageOps

from balcap_mega.data import headers, image_files
from balcap_mega.data.files import ImageFileDataset
from balcap_mega.data.headers import MOST_OBLONG, MOST_SCANS, picture_size
from balcap_mega.data.images import DaliDecoder, PilDecoder, decode, shrink, why_unreadable
from balcap_mega.errors import UserError
from tests.test_data_files import encoded, rows

PHOTO = Image.open(Path(skimage.__file__).parent / "data" / "coffee.png").convert("RGB").resize((90, 60))


@pytest.fixture(scope="module")
def dali():
    return DaliDecoder(batch_size=4)


def with_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[headers.ORIENTATION] = orientation
    return exif


def text_on_nothing() -> Image.Image:
    """Black where it is opaque, and black, as editors leave it, where it is not."""
    alpha = np.zeros((20, 30), np.uint8)
    alpha[8:12] = 255
    return Image.merge("LA", (Image.new("L", (30, 20)), Image.fromarray(alpha)))


def palette() -> Image.Image:
    image = Image.fromarray((np.asarray(text_on_nothing())[..., 1] == 0).astype(np.uint8), "L").convert("P")
    image.putpalette([0] * 6)
    return image


TRANSPARENT = {
    "grey + alpha": (lambda: text_on_nothing(), "PNG", {}),
    "colour + alpha": (lambda: text_on_nothing().convert("RGBA"), "PNG", {}),
    "palette": (palette, "PNG", {"transparency": 1}),
    "palette of a GIF": (palette, "GIF", {"transparency": 1}),
    "WebP": (lambda: text_on_nothing().convert("RGBA"), "WEBP", {"lossless": True}),
    "TIFF": (lambda: text_on_nothing().convert("RGBA"), "TIFF", {}),
    "AVIF": (lambda: text_on_nothing().convert("RGBA"), "AVIF", {"quality": 100}),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_is_white(kind, dali):
    make, file_format, options = TRANSPARENT[kind]
    data = encoded(make(), file_format, **options)
    for picture in (decode(data), *dali([data])):
        pixels = np.asarray(picture)
        assert pixels[:6].min() > 245 and pixels[9:11].max() < 10


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "JPEG2000", "white is 0"])
def test_16_bits_are_scaled_to_8(file_format, dali):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (8, 1))
    if file_format == "white is 0":
        data = encoded(Image.fromarray(65535 - ramp), "TIFF", tiffinfo={262: 0})
    else:
        data = encoded(Image.fromarray(ramp), file_format)
    for picture in (decode(data), *dali([data])):
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture)[0, :, 0], np.arange(256))


def test_fractions_are_scaled_where_their_range_is_known():
    ramp = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (8, 1))
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(ramp), "TIFF")))[0, :, 0], np.arange(256))
    for values in (ramp * 1000, ramp - 1, ramp * np.nan, (ramp * 1e6).astype(np.int32)):
        assert "colours of the kind" in why_unreadable(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_stand_upright_by_any_decoder_and_their_size_is_known_before(orientation, file_format, dali):
    data = encoded(PHOTO, file_format, exif=with_exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    for picture in (decode(data), *dali([data])):
        assert picture.size == picture_size(data) == expected.size
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    assert shrink(expected, 1000).size == picture_size(data, 1000)


def test_exif_behind_the_pixels_of_a_png_turns_it_too():
    data = encoded(PHOTO, "PNG", exif=with_exif(6))
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    late = data[:start] + data[stop:-12] + data[start:stop] + data[-12:]
    assert picture_size(late) == decode(late).size == (60, 90)


def test_only_what_lies_before_a_pictures_end_is_the_picture(tmp_path, monkeypatch, dali):
    photo = encoded(PHOTO, "JPEG")
    video = b"\0\0\0\x18ftypmp42" + bytes(1000) + b"\xff\xda\0\x02" * 2 * MOST_SCANS
    monkeypatch.setattr(image_files, "MOST_BYTES", len(photo) + 100)
    for name, picture in (("1.jpg", photo), ("2.jpg", encoded(PHOTO, "PNG")[:500])):
        (tmp_path / name).write_bytes(picture + video)
    dataset = ImageFileDataset(rows("1.jpg", "2.jpg"), tmp_path, max_missing_fraction=1)
    assert np.array_equal(np.asarray(dataset[0].image), np.asarray(decode(photo)))
    assert why_unreadable(photo + video) is None and dali([photo + video])[0].size == (90, 60)
    (tmp_path / "2.jpg").write_bytes(b"II*\0" + bytes(len(photo) + 100))
    assert "bytes, more than" in dataset.why_unreadable(1)


@pytest.mark.parametrize("quality", [{"mode": "RGB"}, {"mode": "CMYK"}, {"mode": "L"}])
def test_a_huge_jpeg_is_shrunk_while_it_is_decoded(monkeypatch, quality, dali):
    for module in ("MOST_KEPT_PIXELS", "MOST_PIXELS"):
        monkeypatch.setattr(headers, module, 2000)
    data = encoded(PHOTO.convert(quality["mode"]), "JPEG", exif=with_exif(6))  # 5400 pixels
    assert decode(data).size == picture_size(data) == (30, 45)
    png = encoded(PHOTO, "PNG")
    assert why_unreadable(png) == "has 90 x 60 pixels, more than the 2000 that are decoded of such a file"
    progressive = encoded(PHOTO, "JPEG", progressive=True)
    assert "90 x 60" in why_unreadable(progressive)  # its memory is that of all its pixels


def test_48_megapixels_are_read():
    data = encoded(Image.new("L", (8000, 6000), 118), "JPEG")
    size = picture_size(data)
    assert 4000 * 3000 <= size[0] * size[1] <= headers.MOST_KEPT_PIXELS and size[0] / size[1] == pytest.approx(
        4 / 3, 1e-3
    )
    assert decode(data).size == size


@pytest.mark.parametrize("size", [(3980, 20), (20, 3980), (1999, 10), (199, 1), (5000, 26), (401, 300)])
@pytest.mark.parametrize("most", [28 * 28, 1000, 12345])
def test_a_picture_that_passed_passes_after_shrinking(size, most):
    width, height = shrink(Image.new("L", size), most).size
    assert width * height <= max(most, 0) or (width, height) == size
    assert max(width, height) <= MOST_OBLONG * min(width, height)
    assert (width > height) == (size[0] > size[1])


REASONS = {
    b"": "is empty",
    b"\0\0\0\x18ftypheic\0\0\0\0": "is HEIC",
    b"\xff\x0a\0\0": "is JPEG XL",
    b"<!DOCTYPE html><html>404": "is a web page",
    b"<?xml version='1.0'?><svg xmlns=": "is SVG",
    b"version https://git-lfs.github.com/spec/v1": "Git LFS",
    b"%PDF-1.7": "is a document",
    b'{"error": "forbidden"}': "is JSON",
    b"\0\0\0\x18ftypmp42": "is a video",
    b"hello": "is of no image format",
    encoded(PHOTO, "JPEG")[:-400]: "is cut short",
    encoded(PHOTO, "PNG")[:3000]: "is cut short",
    encoded(Image.new("1", (201, 1)), "PNG"): "is 201 x 1, which is longer than 200 : 1",
    encoded(Image.new("1", (9000, 9000)), "PNG"): "has 9000 x 9000 pixels",
}


@pytest.mark.parametrize("number", range(len(REASONS)))
def test_each_picture_that_is_not_read_has_a_reason(number, tmp_path, caplog):
    data, reason = list(REASONS.items())[number]
    (tmp_path / "1.jpg").write_bytes(data)
    assert PilDecoder()([data]) == [None] and reason in why_unreadable(data)
    with pytest.raises(UserError, match=r"1\.jpg") as refused:
        ImageFileDataset(rows("1.jpg"), tmp_path)[0]
    assert reason in str(refused.value) and reason in caplog.text
