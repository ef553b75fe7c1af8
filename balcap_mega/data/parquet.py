"""Hugging Face data sets as parquet files: texts in memory, embedded pictures read when a record is asked for.

The columns are named by `data.columns`. A picture is embedded (bytes, or the struct of `bytes` and `path` that
`datasets` writes), or the path of a file below the image root.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from balcap_mega.config.schema import ParquetColumns
from balcap_mega.data.annotations import LeftOut
from balcap_mega.data.files import ImageRow
from balcap_mega.data.headers import Unreadable
from balcap_mega.data.image_files import MOST_BYTES
from balcap_mega.data.jsonl import DEFAULT_PROMPT
from balcap_mega.data.questions import FORM, ChoiceQuestion, as_questions
from balcap_mega.data.sharegpt4v import IMAGE_TOKEN
from balcap_mega.errors import UserError

BATCH = 16  # rows that are read together to get at one picture


class ParquetFiles:
    """The parquet file at `path`, or all below that folder in the order of their names.

    Rows are taken for pictures of their own: an embedded picture is called FILE#ROW. Raises UserError for a file that
    is no parquet, or lacks a column.
    """

    def __init__(self, path: str | Path, columns: ParquetColumns):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError("data.source=parquet needs pyarrow", remedy="pip install pyarrow") from None
        self._pyarrow, self._columns, self._path = pyarrow, columns, Path(path)
        names = sorted(self._path.rglob("*.parquet")) if self._path.is_dir() else [self._path]
        if not names:
            raise UserError(f"data.path={path} holds no *.parquet", remedy="name a parquet file, or their folder")
        self._files: dict[str, tuple[Path, Any, list[int]]] = {}
        for file in names:
            self._open(file)

    def rows(self, prefixes: Sequence[str] = ()) -> list[ImageRow | LeftOut]:
        """Every row; with `prefixes`, those whose picture's path, where it has one, starts with one of them."""
        return [row for name in self._files for row in self._rows_of(name, tuple(prefixes))]

    def __contains__(self, image: str) -> bool:
        """Whether `image` is the name of an embedded picture."""
        name, mark, number = image.rpartition("#")
        return bool(mark) and name in self._files and number.isdigit()

    def read(self, image: str) -> bytes:
        """An embedded picture as it is encoded. Raises Unreadable. Reads `BATCH` rows at a time, no more at once."""
        name, _, number = image.rpartition("#")
        path, metadata, starts = self._files[name]
        group = bisect_right(starts, int(number)) - 1
        place = int(number) - starts[group]
        try:
            with self._pyarrow.parquet.ParquetFile(path, metadata=metadata, pre_buffer=False) as file:
                batches = file.iter_batches(BATCH, row_groups=[group], columns=[self._columns.image], use_threads=False)
                for batch in batches:
                    if place < batch.num_rows:
                        return _only_picture(batch.column(0)[place].as_py())
                    place -= batch.num_rows
        except (OSError, self._pyarrow.ArrowException) as error:
            raise Unreadable(f"cannot be read: {_short(error)}") from None
        raise Unreadable("is not there")

    def _open(self, file: Path) -> None:
        try:
            with self._pyarrow.parquet.ParquetFile(file) as opened:
                metadata, schema = opened.metadata, opened.schema_arrow
        except (OSError, self._pyarrow.ArrowException) as error:
            raise UserError(
                f"data.path={file}: not a readable parquet file ({_short(error)})", remedy="download it again"
            ) from None
        for key, column in self._columns:
            if column is not None and column not in schema.names:
                raise UserError(
                    f"data.columns.{key}={column}: {file} has no such column, but {', '.join(schema.names)[:500]}",
                    remedy=f"set data.columns.{key} to one of them",
                )
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        name = file.relative_to(self._path).as_posix() if self._path.is_dir() else file.name
        self._files[name] = (file, metadata, [sum(sizes[:group]) for group in range(len(sizes))])

    def _rows_of(self, name: str, prefixes: tuple[str, ...]) -> Iterator[ImageRow | LeftOut]:
        path, metadata, _ = self._files[name]
        columns, types = self._columns, self._pyarrow.types
        with self._pyarrow.parquet.ParquetFile(path, metadata=metadata) as file:
            kind = file.schema_arrow.field(columns.image).type
            is_text = types.is_string(kind) or types.is_large_string(kind)
            has_path = types.is_struct(kind) and kind.get_field_index("path") >= 0
            by_path = is_text or (has_path and not _has_bytes(metadata, columns.image))
            wanted = {column for key, column in columns if column is not None and key != "image"}
            picture = [columns.image] if is_text else [f"{columns.image}.path"] if has_path else []
            try:
                table = [row for batch in file.iter_batches(columns=[*wanted, *picture]) for row in batch.to_pylist()]
            except (OSError, self._pyarrow.ArrowException) as error:
                raise UserError(f"data.path={path}: {_short(error)}", remedy="download it again") from None
        for number, values in enumerate(table):
            image, embedded = values.get(columns.image), f"{name}#{number}"
            source = image.get("path") if isinstance(image, dict) else image
            if prefixes and not (isinstance(source, str) and source.startswith(prefixes)):
                continue
            yield self._row(f"{path}: row {number}", embedded, source if by_path else embedded, values)

    def _row(self, where: str, identity: str, image: str | None, values: dict[str, Any]) -> ImageRow | LeftOut:
        columns = self._columns
        reference, units = values[columns.reference], values.get(columns.units)
        prompt = DEFAULT_PROMPT if columns.prompt is None else values[columns.prompt]
        if isinstance(reference, list) and len(reference) == 1:
            (reference,) = reference
        for key, text in (("image", image), ("reference", reference), ("prompt", prompt)):
            if isinstance(text, list):
                return LeftOut(where, f"has {len(text)} texts in {getattr(columns, key)}")
            if not isinstance(text, str) or not text.strip():
                return LeftOut(where, f"has no text in {getattr(columns, key)}")
        if units is not None and not (isinstance(units, list) and all(isinstance(unit, str) for unit in units)):
            return LeftOut(where, f"has no list of texts in {columns.units}")
        prompt = prompt.replace(IMAGE_TOKEN, "").strip() or DEFAULT_PROMPT
        named = str(values[columns.id])[:200] if columns.id is not None else identity
        questions = self._questions(where, named, values.get(columns.questions))
        reference = str(reference).strip()
        return ImageRow(named, image, prompt, reference, None if units is None else tuple(units), questions)

    def _questions(self, where: str, record: str, entries: Any) -> tuple[ChoiceQuestion, ...] | None:
        try:
            return None if entries is None else as_questions(entries)
        except ValueError as error:
            raise UserError(f"{where}: record {record!r}: {self._columns.questions}{error}", remedy=FORM) from None


def _has_bytes(metadata: Any, column: str) -> bool:
    """Whether any struct of the column has bytes; `datasets` writes it without them where pictures stay files."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for part in map(group.column, range(group.num_columns)):
            known = part.path_in_schema == f"{column}.bytes" and part.statistics is not None
            if known and part.statistics.has_null_count and part.statistics.null_count == group.num_rows:
                continue
            if part.path_in_schema == f"{column}.bytes":
                return True
    return False


def _only_picture(value: Any) -> bytes:
    if isinstance(value, list):
        if len(value) != 1:
            raise Unreadable(f"is {len(value)} pictures")
        (value,) = value
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise Unreadable("holds no picture")
    return data[:MOST_BYTES]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
