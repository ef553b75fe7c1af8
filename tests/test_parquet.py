"""Hugging Face data sets in parquet files, written by `datasets` itself, pictures embedded or by path."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from balcap_mega.config.preflight import check_data
from balcap_mega.config.schema import DataConfig
from balcap_mega.data.annotations import LeftOut
from balcap_mega.data.parquet import ParquetFiles
from balcap_mega.data.sources import build_datasets
from balcap_mega.errors import UserError
from tests.test_data_files import encoded

NAMES = {"image": "photo", "reference": "caption", "prompt": "question"}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (20 + number, 10), (number, 0, 0))


def config(path: Path, columns: dict = NAMES, **changes) -> DataConfig:
    return DataConfig(source="parquet", path=str(path), columns=columns, eval_size=2, **changes)


def table(photos: list, **columns) -> dict:
    count = len(photos)
    return {
        "photo": photos,
        "caption": [f"Caption {number}." for number in range(count)],
        "question": ["<image>\nWhat is this?"] * count,
        **columns,
    }


def test_a_data_set_written_by_datasets_is_read(tmp_path):
    from datasets import Dataset

    for shard in range(2):
        photos = [picture(10 * shard + number) for number in range(10)]
        Dataset.from_dict(table(photos)).to_parquet(tmp_path / f"train-{shard:05}.parquet", batch_size=4)
    check_data(config(tmp_path))
    train, held_out = build_datasets(config(tmp_path), seed=0)
    assert (len(train), len(held_out)) == (18, 2)
    seen = set()
    for dataset in (train, held_out):
        for index, (row, record) in enumerate(zip(dataset.rows, dataset.load(range(len(dataset))))):
            name, number = row.image.split("#")
            value = 10 * int(name == "train-00001.parquet") + int(number)
            assert record.image.size == dataset.picture_size(index) == (20 + value, 10)
            assert np.asarray(record.image)[0, 0].tolist() == [value, 0, 0]
            assert (record.reference, record.prompt) == (f"Caption {number}.", "What is this?")
            seen.add(value)
    assert seen == set(range(20))


def written(path: Path, columns: dict, schema=None) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), path, row_group_size=3)
    return path


@pytest.mark.parametrize("form", ["bytes", "struct", "list", "path", "struct of path"])
def test_pictures_are_embedded_or_files(form, tmp_path):
    files = [encoded(picture(number), "PNG") for number in range(5)]
    (tmp_path / "a").mkdir()
    for number, data in enumerate(files):
        (tmp_path / "a" / f"{number}.png").write_bytes(data)
    paths = [f"a/{number}.png" for number in range(5)]
    photos = {
        "bytes": files,
        "struct": [{"bytes": data, "path": path} for data, path in zip(files, paths)],
        "list": [[{"bytes": data, "path": None}] for data in files],
        "path": paths,
        "struct of path": [{"bytes": None, "path": path} for path in paths],
    }[form]
    if form == "struct of path":
        photos = pyarrow.array(photos, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    path = written(tmp_path / "rows.parquet", table(photos))
    for dataset in build_datasets(config(path, image_root=str(tmp_path)), seed=0):
        for row, record in zip(dataset.rows, dataset.load(range(len(dataset)))):
            assert record.image.width == 20 + int(record.reference.removeprefix("Caption ").removesuffix("."))
            assert row.image.startswith("a/" if "path" in form else "rows.parquet#")
    if form in ("struct", "path"):
        kept = ParquetFiles(path, config(path).columns).rows(("a/3", "b/"))
        assert [row.reference for row in kept] == ["Caption 3."]


def test_what_cannot_be_used_is_named(tmp_path):
    good = encoded(picture(1), "PNG")
    captions = [["One."], ["One.", "Two."], None, ["Three."], ["Four."], ["Five."]]
    photos = [good, good, good, None, b"no picture", good]
    path = written(tmp_path / "rows.parquet", table(photos, caption=captions))
    rows = ParquetFiles(path, config(path).columns).rows()
    reasons = [row.reason for row in rows if isinstance(row, LeftOut)]
    assert reasons == ["has 2 texts in caption", "has no text in caption"]
    train, held_out = build_datasets(config(path, max_missing_fraction=1.0), seed=0)
    reasons = {dataset.why_unreadable(i) for dataset in (train, held_out) for i in range(len(dataset))}
    assert reasons == {None, "holds no picture", "is of no image format that is read here"}
    with pytest.raises(UserError, match="row 1 has 2 texts"):
        build_datasets(config(path), seed=0)


def test_a_file_of_another_form_is_refused(tmp_path):
    path = written(tmp_path / "rows.parquet", table([b"x"]))
    with pytest.raises(UserError, match=r"data.columns.reference=reference: .* photo, caption, question"):
        build_datasets(config(path, {"image": "photo"}), seed=0)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a readable parquet file"):
        build_datasets(config(path), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \*\.parquet"):
        build_datasets(config(tmp_path / "empty"), seed=0)
