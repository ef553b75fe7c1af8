"""CaptionQA's questions: which are put, how their options are shuffled, and how a reply to one is read and scored.

The quirks of the original that `mend=True` mends are listed in `captionqa`.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from balcap_mega.data.questions import CANNOT_ANSWER, LETTERS
from balcap_mega.errors import UserError
from balcap_mega.evaluation.session import read_json, read_json_lines

CANNOT_ANSWER_BONUS = 0.05
VERBS = (
    "is", "are", "was", "were", "do", "does", "did", "have", "has", "had", "can", "could", "will", "would",
    "should", "shall", "may", "might", "must",
)  # fmt: skip
EXPORT = "export the data set as JSON, JSON Lines or Parquet"


@dataclass(frozen=True)
class Question:
    """One question as it is put. `order[i]` is the original place of the i-th option shown."""

    image: str
    text: str
    choices: tuple[str, ...]
    answer: str
    correct: int
    category: str
    domain: str
    options: tuple[str, ...]
    order: tuple[int, ...]

    @property
    def key(self) -> str:
        """Tells it from the other questions about its image, as far as a file of results does."""
        return repr((self.text, list(self.choices), self.answer))

    def prompt(self, caption: str) -> str:
        shown = "\n".join(f"{LETTERS[i]}. {self.options[place]}" for i, place in enumerate(self.order))
        return f"Caption:\n{caption}\n\nQuestion:\n{self.text}\n\nOptions:\n{shown}\n\nAnswer:"

    def result(self, reply: str, mend: bool) -> dict:
        """The answer in the original's result format."""
        letter = read_letter(reply, len(self.options), mend)
        chosen = None if letter is None else self.order[LETTERS.index(letter)]
        declined = chosen is not None and self.options[chosen] == CANNOT_ANSWER
        correct = not declined and chosen == self.correct
        score = 1 / len(self.choices) + CANNOT_ANSWER_BONUS if declined else float(correct)
        return {
            "question": self.text,
            "choices": list(self.choices),
            "ground_truth": self.answer,
            "model_answer": None if chosen is None else self.options[chosen],
            "model_response": reply,
            "is_correct": correct,
            "is_cannot_answer": declined,
            "score": score if mend else round(score, 4),
            "category": self.category,
        }


class Asked(TypedDict, total=False):
    """A question as the data set has it."""

    question: str
    choices: list[Any] | None
    answer: Any
    category: str | list[str] | None


class Row(Asked, total=False):
    """A row of the data set: an image's questions, or one question."""

    id: str | int | None
    domain: str | None
    questions: list[Asked] | None


def plan(rows: Sequence[Row], captions: dict[str, str], seed: int = 0, mend: bool = False) -> list[Question]:
    """The questions about captioned images in order, options shuffled by one generator that runs through them.

    Raises UserError for one with more options than letters.
    """
    shuffler = random.Random(seed)
    questions = []
    for row in rows:
        image = str(row.get("id"))
        if row.get("id") is None or (not mend and image not in captions):
            continue
        for asked in _questions_of(row):
            choices = tuple(asked.get("choices") or ())
            correct = _correct_choice(choices, asked.get("answer"))
            if len(choices) < 2 or correct is None:
                continue
            text = asked.get("question", "")
            options = tuple(map(str, choices))
            if not is_yes_no(text, options, mend):
                options += (CANNOT_ANSWER,)
            if len(options) > len(LETTERS):
                raise UserError(
                    f"--questions: {text!r} about {image!r} has {len(options)} options, and {len(LETTERS)} letters "
                    "are all there are",
                    remedy="take that question out of the file",
                )
            order = list(range(len(options)))
            shuffler.shuffle(order)
            questions.append(
                Question(
                    image, text, choices, asked.get("answer"), correct, _first(asked.get("category")),
                    str(row.get("domain") or image.split("_")[0]), options, tuple(order),
                )
            )  # fmt: skip
    return questions


def _questions_of(row: Row) -> Sequence[Asked]:
    questions = row.get("questions")
    return questions if questions else [row] if "question" in row else []


def _first(category: Any) -> str:
    if isinstance(category, list):
        return category[0] if category else ""
    return category or ""


def _correct_choice(choices: Sequence[Any], answer: Any) -> int | None:
    if not isinstance(answer, str):
        return None
    return next((i for i, choice in enumerate(choices) if str(choice).strip() == answer.strip()), None)


def is_yes_no(question: str, choices: Sequence[str], mend: bool) -> bool:
    """Whether the question gets no "cannot answer" option."""
    texts = [choice.strip().lower() for choice in choices]
    if mend:
        leads = {re.split(r"\W", text, maxsplit=1)[0] for text in texts}
        return {"yes", "no"} <= leads
    if any("yes" in text for text in texts) and any("no" in text for text in texts):
        return True
    return question.strip().lower().startswith(tuple(f"{verb} " for verb in VERBS))


def read_letter(reply: str, options: int, mend: bool) -> str | None:
    """The option that a reply names, by letter or by number from 1; None if it names none."""
    if mend:
        text = reply.split("</think>")[-1].split("Answer:")[-1]
        found = re.match(r"\W*([A-Za-z])(?![A-Za-z'])", text)
        letter = found.group(1).upper() if found else None
        return letter if letter is not None and LETTERS.index(letter) < options else None
    reply = reply.strip()
    for marker in ("</think>", "Answer: ", "\n"):
        reply = reply.split(marker, 1)[-1]
    found = re.search(r"\b([A-Z])\b", reply.upper())
    if found and LETTERS.index(found.group(1)) < options:
        return found.group(1)
    found = re.search(r"\b([1-9][0-9]?)\b", reply)
    return LETTERS[int(found.group(1)) - 1] if found and int(found.group(1)) <= options else None


def read_questions(path: str | Path) -> list["Row"]:
    """Rows of the data set, without their images."""
    if Path(path).suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"--questions {path}: reading Parquet needs pyarrow, which is not installed",
                remedy="pip install pyarrow, or export the data set as JSON or JSON Lines",
            ) from error
        try:
            columns = set(pyarrow.parquet.read_schema(path).names) - {"images"}
            rows = pyarrow.parquet.read_table(path, columns=sorted(columns)).to_pylist()
            return TypeAdapter(list[Row]).validate_python(rows)
        except (OSError, ValueError) as error:  # pyarrow's and pydantic's own errors are such too
            raise UserError(f"{path}: not a readable Parquet file of questions ({error})", remedy=EXPORT) from error
    if Path(path).suffix == ".jsonl":
        return read_json_lines(path, "CaptionQA's questions", Row)
    return read_json(path, "CaptionQA's questions", list[Row])


def pictures_by_id(rows: Sequence[Row], folder: Path | None) -> dict[str, str]:
    """The file name in `folder` of each row's picture, by its id. Raises UserError for an id with two of them."""
    if folder is None or not folder.is_dir():
        raise UserError(
            f"pictures to caption: {folder} is no folder",
            remedy="name the folder of images, each named by its id (--images; benchmarks.captionqa.images in a run)",
        )
    ids = {str(row.get("id")) for row in rows}
    names: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.stem in ids:
            if path.stem in names:
                raise UserError(
                    f"--images {folder} has {names[path.stem]} and {path.name} for one id", remedy="remove one of them"
                )
            names[path.stem] = path.name
    return names
