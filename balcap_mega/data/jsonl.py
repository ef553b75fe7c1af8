"""Image and reference pairs, one JSON object a line; what `launch/prepare_data.py` writes.

    {"image": "photos/cat.jpg", "reference": "A cat …", "id": "…", "prompt": "…", "units": ["There is a cat.", …],
     "questions": [{"question": "What is on the sofa?", "choices": ["A cat", "A dog"], "answer": "A cat"}, …]}

Only `image` and `reference` are needed; `questions` are for the reward `utility`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from balcap_mega.data.annotations import LeftOut, broken_text, loosely_parsed, read_text_file
from balcap_mega.data.files import ImageRow
from balcap_mega.data.questions import FORM, QuestionEntry, Text, problem_of
from balcap_mega.errors import UserError

DEFAULT_PROMPT = "Describe this image in detail."


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    image: str
    reference: Text
    id: str | None = None
    prompt: Text = DEFAULT_PROMPT
    units: list[str] | None = None
    questions: list[QuestionEntry] | None = None


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
            raise _refused(f"{path}:{number}", text, error) from error
        units = None if line.units is None else tuple(line.units)
        questions = None if line.questions is None else tuple(entry.as_question() for entry in line.questions)
        yield ImageRow(line.id or line.image, line.image, line.prompt, line.reference, units, questions)


def _refused(where: str, line: bytes, error: ValidationError) -> UserError:
    problem = problem_of(error).removeprefix(".")
    if not problem.startswith("questions"):
        known = 'each line needs "image" and "reference" and may have "id", "prompt", "units" and "questions"'
        return UserError(f"{where}: {problem if problem[0] != ':' else f'the line{problem}'}", remedy=known)
    row = json.loads(line)
    name = str(row.get("id") or row.get("image"))[:200]
    return UserError(f"{where}: record {name!r}: {problem}", remedy=FORM)


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
        questions=None if row.questions is None else [QuestionEntry.of(question) for question in row.questions],
    )
    return json.dumps(line.model_dump(exclude_none=True), ensure_ascii=False)


def drop_cut_line(path: str | Path) -> None:
    """Remove the last line of a JSON Lines file if an interruption cut it short; the file may be absent."""
    path = Path(path)
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])
