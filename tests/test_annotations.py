"""Annotations as people have them: rows that are read, rows left out by name, paths refused by what they are."""

import codecs
import json

import pytest

from balcap_mega.data.annotations import LeftOut
from balcap_mega.data.files import ImageFileDataset, ImageRow
from balcap_mega.data.jsonl import read_jsonl
from balcap_mega.data.sharegpt4v import read_sharegpt4v
from balcap_mega.errors import UserError
from tests.test_data_files import conversation, rows, write_image, write_json

LINE = {"image": "a.jpg", "reference": "A red kite."}


def turn(who: str, text: str) -> dict:
    return {"from": who, "value": text}


@pytest.mark.parametrize(
    "turns",
    [
        [turn("gpt", "Hello, what would you like to know?"), turn("human", "<image>\nWhat?"), turn("gpt", "A kite.")],
        [turn("system", "Be brief."), turn("human", "What?<image>"), turn("gpt", "A kite.")],
        [turn("human", "Hi!"), turn("gpt", "Hello."), turn("human", "<image>What?"), turn("gpt", "A kite.")],
        [turn("human", "What?"), turn("gpt", "A kite."), turn("human", "And?"), turn("gpt", "No.")],
    ],
)
def test_the_reference_is_the_answer_to_the_question_about_the_image(turns, tmp_path):
    path = write_json(tmp_path / "rows.json", [{"id": "7", "image": "a.jpg", "conversations": turns}])
    assert read_sharegpt4v(path) == [ImageRow("7", "a.jpg", "What?", "A kite.")]


def test_a_list_of_one_image_is_that_image_and_what_is_left_out_is_named(tmp_path, caplog):
    def talk(**images):
        return {"conversations": conversation("")["conversations"], **images}

    entries = [
        talk(images=["a.png"]), talk(image=["a.png"]), talk(image="a.png"), talk(image=None, images=["a.png"]),
        talk(images=["a.png", "b.png"]), talk(image=None), talk(images=[]), talk(),
    ]  # fmt: skip
    path = write_json(tmp_path / "rows.json", entries)
    found = read_sharegpt4v(path)
    assert [row.image for row in found[:4]] == ["a.png"] * 4
    assert found[4:] == [LeftOut(f"data.path={path}: row 4", "has 2 images")]
    assert "3 of 8 rows have no image and are left out, e.g. row 5" in caplog.text
    write_image(tmp_path / "a.png")
    assert ImageFileDataset(found, tmp_path, max_missing_fraction=0.2).missing == 1
    with pytest.raises(UserError, match="row 4 has 2 images"):
        ImageFileDataset(found, tmp_path, max_missing_fraction=0.1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_a_byte_order_mark_is_read(encoding, tmp_path):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "rows.json").write_bytes(
        mark + json.dumps([conversation("é.jpg")], ensure_ascii=False).encode(encoding)
    )
    (tmp_path / "rows.jsonl").write_bytes(mark + f"{json.dumps(LINE)}\n{json.dumps(LINE)}\n".encode(encoding))
    assert [row.image for row in read_sharegpt4v(tmp_path / "rows.json")] == ["é.jpg"]
    assert [row.reference for row in read_jsonl(tmp_path / "rows.jsonl")] == ["A red kite."] * 2


@pytest.mark.parametrize(
    "broken", [rb"A \ud83d kite.", rb"A \udc00\ud83d kite.", b"A \xff kite.", b"A \xed\xa0\xbd kite."]
)
def test_half_a_character_costs_its_row_alone(broken, tmp_path):
    line = json.dumps(LINE).encode()
    (tmp_path / "rows.jsonl").write_bytes(line + b"\n" + line.replace(b"A red kite.", broken) + b"\n" + line)
    talk = json.dumps(conversation("a.jpg")).encode()
    (tmp_path / "rows.json").write_bytes(b"[" + talk + b"," + talk.replace(b"A field.", broken) + b"," + talk + b"]")
    for found, where in ((read_jsonl(tmp_path / "rows.jsonl"), "rows.jsonl:2"),
                         (read_sharegpt4v(tmp_path / "rows.json"), "rows.json: row 1")):  # fmt: skip
        assert [isinstance(row, LeftOut) for row in found] == [False, True, False]
        assert where in str(found[1]) and "half a character" in str(found[1])


def test_a_path_is_refused_by_what_it_is(tmp_path):
    kinds = {
        "https://example.org/photo.jpg": "is an address",
        "s3://bucket/photo.jpg": "is an address",
        "data:image/png;base64,iVBORw0KGgo=": "is the picture itself",
        "images\\photo.jpg": "is a Windows path",
        "C:/photos/1.jpg": "is a Windows path",
        "/etc/passwd": "does not lie below the image root",
    }
    for path, kind in kinds.items():
        with pytest.raises(UserError, match=kind):
            ImageFileDataset(rows(path), tmp_path)
    with pytest.raises(UserError) as refused:
        ImageFileDataset(rows(*kinds), tmp_path)
    assert all(kind in str(refused.value) for kind in kinds.values())
