"""Image and reference pairs, one JSON object a line; what `launch/prepare_data.py` writes.

    {"image": "photos/cat.jpg", "reference": "A cat …", "id": "…", "prompt": "…", "units": ["There is a cat.", …]}

Only `image` and `reference` are needed.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from balcap_mega.data.annotations import LeftOut, broken_text, loosely_parsed, read_text_file
from balcap_mega.data.files import ImageRow
from balcap_mega.errors import UserError

DEFAULT_PROMPT = "Describe this image in detail."


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("blank")
    return text


Text = Annotated[str, AfterValidator(not_blank)]


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    image: str
    reference: Text
    id: str | None = None
    prompt: Text = DEFAULT_PROMPT
    units: list[str] | None = None


def read_jsonl(path: str | Path, prefixes: Sequence[str] = ()) -> list[ImageRow | LeftOut]:
    """The rows of the file. Raises UserError naming the line that is not of the format.

    A row whose texts hold what is no character is left out.
    """
    lines = read_text_file(path, "name a JSON Lines file").splitlines()  # of a text, they would end at U+2028 too
    rows = list(_rows(path, lines))
    if not prefixes:
        return rows
    return [row for row in rows if isinstance(row, LeftOut) or row.image.startswith(tuple(prefixes))]


def _rows(path: str | Path, lines: Iterable[bytes]) -> Iterator[ImageRow | LeftOut]:
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = Line.model_validate_json(text)
        except ValidationError as error:
            if reason := _broken(text):
                yield LeftOut(f"{path}:{number}", reason)
                continue
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the line"
            raise UserError(
                f"{path}:{number}: {key}: {first['msg']}",
                remedy='each line needs "image" and "reference" and may have "id", "prompt" and "units"',
            ) from error
        units = None if line.units is None else tuple(line.units)
        yield ImageRow(line.id or line.image, line.image, line.prompt, line.reference, units)


def _broken(line: bytes) -> str | None:
    try:
        return broken_text(loosely_parsed(line))
    except ValueError:
        return None


def as_line(row: ImageRow) -> str:
    """The row as one line of the file, without its end."""
    line = Line(
        image=row.image,
        reference=row.reference,
        id=row.id,
        prompt=row.prompt,
        units=None if row.units is None else list(row.units),
    )
    return json.dumps(line.model_dump(exclude_none=True), ensure_ascii=False)


def drop_cut_line(path: str | Path) -> None:
    """Remove the last line of a JSON Lines file if an interruption cut it short; the file may be absent."""
    path = Path(path)
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])
