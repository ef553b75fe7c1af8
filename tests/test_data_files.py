"""Real files: ShareGPT4V and JSONL annotations, missing and corrupt images, decoders, sizes, and the sampler."""

import io
import json
import os
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from balcap_mega.config.schema import DataConfig
from balcap_mega.data.files import ImageFileDataset, ImageRow
from balcap_mega.data.headers import MOST_PIXELS
from balcap_mega.data.images import DaliDecoder, PilDecoder
from balcap_mega.data.jsonl import as_line, read_jsonl
from balcap_mega.data.sampler import RecordSampler
from balcap_mega.data.sharegpt4v import read_sharegpt4v
from balcap_mega.data.sources import build_datasets
from balcap_mega.errors import UserError

PHOTOS = Path(skimage.__file__).parent / "data"
PHOTO_ROWS = Path(__file__).parent / "data" / "photos.jsonl"


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def write_image(path: Path, size=(8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path)


def conversation(image: str, question: str = "<image>\nWhat is this?", answer: str = "A field.") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "7", "image": image, "conversations": turns}


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def rows(*images: str) -> list[ImageRow]:
    return [ImageRow(image, image, "Describe.", "A field.") for image in images]


@pytest.mark.parametrize("question", ["<image>\nWhat is this?", "What is this?\n<image>", "What is this?"])
def test_the_image_token_may_stand_anywhere(tmp_path, question):
    path = write_json(tmp_path / "rows.json", [conversation("a/b/c.jpg", question)])
    assert read_sharegpt4v(path) == [ImageRow("7", "a/b/c.jpg", "What is this?", "A field.")]


def test_llava_mixes_have_rows_without_image_and_further_turns(tmp_path):
    talk = conversation("coco/1.jpg")
    talk["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "Nothing."}]
    entries = [{"id": "text", "conversations": []}, talk, conversation("sam/2.jpg")]
    path = write_json(tmp_path / "rows.json", entries)
    assert [row.reference for row in read_sharegpt4v(path)] == ["A field.", "A field."]
    assert [row.image for row in read_sharegpt4v(path, prefixes=("sam/", "web-"))] == ["sam/2.jpg"]


@pytest.mark.parametrize(
    "entry",
    [
        {"image": "a.jpg"},
        {"image": "a.jpg", "conversations": "hello"},
        {"image": 3, "conversations": conversation("a")["conversations"]},
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "Hi"}]},
        conversation("a.jpg", question="<image>"),
        conversation("a.jpg", answer=" "),
        "a.jpg",
    ],
)
def test_a_malformed_row_is_named(tmp_path, entry):
    path = write_json(tmp_path / "rows.json", [conversation("fine.jpg"), entry])
    with pytest.raises(UserError, match=r"rows\.json: row 1 "):
        read_sharegpt4v(path)


@pytest.mark.parametrize("text", ["{}", "[", ""])
def test_a_file_of_another_format_is_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=r"rows\.json"):
        read_sharegpt4v(tmp_path / "rows.json")
    with pytest.raises(UserError, match=r"absent\.json"):
        read_sharegpt4v(tmp_path / "absent.json")


def test_jsonl_goes_there_and_back_and_names_a_bad_line(tmp_path):
    originals = read_jsonl(PHOTO_ROWS)
    copy = tmp_path / "copy.jsonl"
    copy.write_text("\n".join(map(as_line, originals)) + "\n\n")
    assert read_jsonl(copy) == originals
    copy.write_text('{"image": "a.jpg", "reference": "x"}\n{"image": "a.jpg", "refrence": "x"}\n')
    with pytest.raises(UserError, match=r"copy\.jsonl:2: re"):
        read_jsonl(copy)


def test_the_photo_set_is_complete():
    dataset = ImageFileDataset(read_jsonl(PHOTO_ROWS), PHOTOS)
    assert len(dataset) == 10 and dataset.missing == 0
    for record in dataset.load(range(10)):
        assert record.image.mode == "RGB" and len(record.units) >= 5
        assert 20 <= len(record.reference.split()) <= 80


def test_missing_images_are_left_out_up_to_the_limit(tmp_path):
    for name in ("a/1.png", "a/b/2.png", "c/3.png"):
        write_image(tmp_path / name)
    wanted = rows("a/1.png", "a/gone.png", "nowhere/4.png", "a/b/2.png", "c/3.png")
    dataset = ImageFileDataset(wanted, tmp_path, max_missing_fraction=0.4)
    assert [dataset[i].id for i in range(len(dataset))] == ["a/1.png", "a/b/2.png", "c/3.png"]
    assert dataset.missing == 2
    with pytest.raises(UserError, match="2 of 5 images are missing"):
        ImageFileDataset(wanted, tmp_path, max_missing_fraction=0.39)
    with pytest.raises(UserError, match="no row"):
        ImageFileDataset(rows("x.png"), tmp_path, max_missing_fraction=1)
    with pytest.raises(IndexError):
        dataset[3]


@pytest.mark.parametrize("decoder", [PilDecoder, DaliDecoder])
def test_a_corrupt_image_is_replaced_by_the_next_and_counted_once(tmp_path, decoder):
    for name in ("0.png", "3.png"):
        write_image(tmp_path / name)
    (tmp_path / "1.png").write_bytes(b"not an image")
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:50])
    dataset = ImageFileDataset(
        rows("0.png", "1.png", "2.png", "3.png"), tmp_path, decode=decoder(), max_missing_fraction=0.5
    )
    assert [record.id for record in dataset.load([0, 1, 2, 3, 1])] == ["0.png", "3.png", "3.png", "3.png", "3.png"]
    assert dataset.corrupt == 2
    strict = ImageFileDataset(rows("0.png", "1.png"), tmp_path, decode=decoder(), max_missing_fraction=0.1)
    with pytest.raises(UserError, match="1 are corrupt"):
        strict[1]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../b.png", "a\\..\\b.png", "", "a\0.png"])
def test_a_path_out_of_the_image_root_is_refused(tmp_path, path):
    with pytest.raises(UserError, match="image root"):
        ImageFileDataset(rows(path), tmp_path)


def test_a_bomb_is_refused_from_its_header():
    side = int(MOST_PIXELS**0.5) + 1
    bomb = encoded(Image.new("1", (side, side)), "PNG")  # decodes to a thousand times its own size
    assert len(bomb) < 100_000
    start = time.perf_counter()
    assert PilDecoder()([bomb]) == [None] and DaliDecoder()([bomb]) == [None]
    assert time.perf_counter() - start < 5
    header = bomb[:16] + (60000).to_bytes(4, "big") * 2 + bomb[24:]
    enormous = header[:29] + zlib.crc32(header[12:29]).to_bytes(4, "big") + header[33:]  # past PIL's own limit
    assert PilDecoder()([enormous]) == [None]


def every_kind_of_file() -> dict[str, bytes]:
    photo = Image.open(PHOTOS / "coffee.png").convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": encoded(photo, "JPEG", quality=80),
        "progressive": encoded(photo, "JPEG", progressive=True),
        "turned": encoded(photo, "JPEG", exif=turned),
        "cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "grey": encoded(photo.convert("L"), "JPEG"),
        "png": encoded(photo, "PNG"),
        "alpha": encoded(photo.convert("RGBA"), "PNG"),
        "palette": encoded(photo.convert("P"), "PNG"),
        "16 bit": encoded(Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256)), "PNG"),
        "webp": encoded(photo, "WEBP"),
        "bmp": encoded(photo, "BMP"),
        "gif": encoded(photo, "GIF"),
        "cut": encoded(photo, "JPEG")[:-300],
        "junk": b"\xff\xd8\xff junk",
        "empty": b"",
        "tiff": encoded(photo, "TIFF"),
    }


def test_dali_and_pil_decode_every_kind_of_file_to_the_same_pixels():
    files = every_kind_of_file()
    by_pil = dict(zip(files, PilDecoder()(list(files.values()))))
    assert [name for name, picture in by_pil.items() if picture is None] == ["cut", "junk", "empty"]
    assert by_pil["turned"].size == (400, 600)
    sound = [data for name, data in files.items() if by_pil[name] is not None]
    for batch in (list(files.values()), sound):  # a batch with damaged files goes to PIL, one without does not
        for ours, dalis in zip(PilDecoder()(batch), DaliDecoder(batch_size=5)(batch)):
            assert (ours is None) == (dalis is None)
            if ours is not None:
                np.testing.assert_array_equal(np.asarray(ours), np.asarray(dalis))


def test_large_pictures_are_shrunk_in_their_shape(tmp_path):
    for name, size in (("1.png", (90, 60)), ("2.png", (40, 30)), ("3.png", (2, 380))):
        write_image(tmp_path / name, size)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(as_line, rows("1.png", "2.png", "3.png"))) + "\n")
    config = DataConfig(
        source="jsonl", path=str(tmp_path / "rows.jsonl"), image_root=str(tmp_path), eval_size=1, max_pixels=28 * 28
    )
    records = [dataset[index] for dataset in build_datasets(config, 0) for index in range(len(dataset))]
    sizes = {record.id: record.image.size for record in records}
    assert sizes == {"1.png": (34, 22), "2.png": (32, 24), "3.png": (2, 380)}


def test_a_large_annotation_file_opens_without_opening_its_images(tmp_path):
    write_image(tmp_path / "one.png")
    names = [f"web/{i % 50}/{i}.png" for i in range(20_000)]
    for folder in range(50):
        (tmp_path / "web" / str(folder)).mkdir(parents=True)
    for name in names:
        os.link(tmp_path / "one.png", tmp_path / name)
    path = write_json(tmp_path / "rows.json", [conversation(name) for name in names])
    decoded = []
    start = time.perf_counter()
    dataset = ImageFileDataset(
        read_sharegpt4v(path), tmp_path, decode=lambda files: decoded.extend(files) or PilDecoder()(files)
    )
    assert time.perf_counter() - start < 5
    assert len(dataset) == 20_000 and not decoded
    dataset.load([3, 5])
    assert len(decoded) == 2


def test_a_run_gets_its_datasets_by_name():
    config = DataConfig(source="jsonl", path=str(PHOTO_ROWS), image_root=str(PHOTOS), eval_size=3, image_backend="dali")
    train, held_out = build_datasets(config, seed=0)
    assert (len(train), len(held_out)) == (7, 3)
    assert not {row.image for row in train.rows} & {row.image for row in held_out.rows}
    assert [row.id for row in build_datasets(config, seed=1)[1].rows] == [row.id for row in held_out.rows]
    with pytest.raises(UserError, match="eval_size=10"):
        build_datasets(config.model_copy(update={"eval_size": 10}), seed=0)
    train, held_out = build_datasets(DataConfig(train_size=5, eval_size=2), seed=0)
    assert (len(train), len(held_out)) == (5, 2)


def test_each_epoch_shows_every_record_once_in_a_new_order():
    sampler = RecordSampler(size=10, seed=3, batch_size=4)
    stream = [index for step in range(10) for index in sampler.indices(step)]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_stream_is_a_function_of_the_seed_alone():
    stream = lambda seed, batch, steps: [i for s in range(steps) for i in RecordSampler(7, seed, batch).indices(s)]  # noqa: E731
    assert stream(0, 4, 6) == stream(0, 6, 4) == stream(0, 24, 1)
    assert stream(0, 4, 6) != stream(1, 4, 6)
    # Frozen: a resumed run must go on with the same records, whatever version of NumPy it finds.
    assert RecordSampler(10, 0, 10).indices(0) == FROZEN


FROZEN = [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]


def test_ranks_share_a_batch():
    sampler = RecordSampler(size=10, seed=0, batch_size=6)
    for step in (0, 1, 17):
        shares = [sampler.shard(step, rank, 3) for rank in range(3)]
        assert [index for share in shares for index in share] == sampler.indices(step)
        assert {len(share) for share in shares} == {2}
    with pytest.raises(ValueError):
        sampler.shard(0, 0, 4)
