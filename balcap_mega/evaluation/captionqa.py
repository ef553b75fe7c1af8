"""CaptionQA (arXiv 2511.21025): questions about an image, answered from its caption alone.

Reads and writes the formats of bronyayang/CaptionQA: captions as one JSON object {id: caption}, questions as rows of
the data set (JSON, JSON Lines or Parquet), results as one JSON object {id: [answer, …]} as the original writes them.

For the same replies the scores are the original's. Its quirks, each mended by `mend=True`:
- a question is taken for a yes/no question, and gets no "cannot answer" option, when "yes" and "no" occur anywhere in
  its choices ("eyes", "snow"), or when it starts with a verb such as "is": "Is the car red or blue?";
- of a reply with a line break only what follows the break is read, so "B\\n" is no answer;
- the first single letter of a reply counts, so "A red car: C" answers A;
- scores are rounded to four decimals before they are added;
- images without a caption are left out (they score 0 when mended).
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from balcap_mega.errors import UserError
from balcap_mega.evaluation.session import for_each, load_prompt, read_json, read_json_lines, write_json
from balcap_mega.rewards.mllm.client import ChatClient
from balcap_mega.rewards.mllm.replies import Completion

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CANNOT_ANSWER = "Cannot answer from the caption"
CANNOT_ANSWER_BONUS = 0.05
VERBS = (
    "is", "are", "was", "were", "do", "does", "did", "have", "has", "had", "can", "could", "will", "would",
    "should", "shall", "may", "might", "must",
)  # fmt: skip
SAVE_EVERY = 50  # questions
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


class Answer(TypedDict):
    """What is read of an answer in a file of results; more stands there."""

    __pydantic_config__ = ConfigDict(extra="allow")

    score: float
    is_correct: bool
    is_cannot_answer: bool
    category: NotRequired[str | None]


def plan(rows: Sequence[Row], captions: dict[str, str], seed: int = 0, mend: bool = False) -> list[Question]:
    """The questions about captioned images in order, options shuffled by one generator that runs through them."""
    shuffler = random.Random(seed)
    questions = []
    for row in rows:
        if row.get("id") is None or (not mend and str(row["id"]) not in captions):
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
            order = list(range(len(options)))
            shuffler.shuffle(order)
            questions.append(
                Question(
                    str(row["id"]), text, choices, asked["answer"], correct, _first(asked.get("category")),
                    str(row.get("domain") or str(row["id"]).split("_")[0]), options, tuple(order),
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
        import pyarrow.parquet

        try:
            columns = set(pyarrow.parquet.read_schema(path).names) - {"images"}
            rows = pyarrow.parquet.read_table(path, columns=sorted(columns)).to_pylist()
            return TypeAdapter(list[Row]).validate_python(rows)
        except (OSError, ValueError) as error:  # pyarrow's and pydantic's own errors are such too
            raise UserError(f"{path}: not a readable Parquet file of questions ({error})", remedy=EXPORT) from error
    if Path(path).suffix == ".jsonl":
        return read_json_lines(path, "CaptionQA's questions", Row)
    return read_json(path, "CaptionQA's questions", list[Row])


@dataclass(frozen=True)
class CaptionQaRun:
    """Captions to question, and where the answers go."""

    questions: Sequence[Question]
    captions: dict[str, str]
    output: Path
    mend: bool = False
    prompts: Path | None = None
    max_tokens: int = 4

    async def run(self, client: ChatClient, progress: Callable[[], None] = lambda: None) -> int:
        """Answer every question that has no answer in `output`; return how many got no reply.

        The answers of an image stand in its questions' order. An image of which a reply failed keeps its answers up
        to there.
        """
        results: dict[str, list[Answer]] = {}
        if self.output.exists():
            results = read_json(self.output, "earlier results", dict[str, list[Answer]])
        done = {image: len(answers) for image, answers in results.items()}
        system = load_prompt("captionqa", self.prompts).strip()
        fresh: dict[str, dict[int, dict]] = defaultdict(dict)
        unsaved = 0

        async def one(place: tuple[int, Question]) -> None:
            nonlocal unsaved
            number, question = place
            if number >= done.get(question.image, 0):
                fresh[question.image][number] = question.result(await self._reply(client, system, question), self.mend)
                answers = results.setdefault(question.image, [])
                while len(answers) in fresh[question.image]:
                    answers.append(fresh[question.image].pop(len(answers)))
                unsaved += 1
                if unsaved >= SAVE_EVERY:
                    write_json(self.output, results)
                    unsaved = 0
            progress()

        try:
            return await for_each(self._places(), one, client.endpoint.concurrency)
        finally:
            write_json(self.output, {image: answers for image, answers in results.items() if answers})

    def _places(self) -> Iterator[tuple[int, Question]]:
        """Each question with its number among those of its image."""
        count: dict[str, int] = defaultdict(int)
        for question in self.questions:
            yield count[question.image], question
            count[question.image] += 1

    async def _reply(self, client: ChatClient, system: str, question: Question) -> str:
        if question.image not in self.captions:
            return ""
        prompt = question.prompt(self.captions[question.image])
        body = {
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}],
            "temperature": 0,
            "max_completion_tokens": self.max_tokens,
        }
        return await client.ask(body, _content)


def _content(completion: Completion) -> str:
    return completion.choices[0].message.content or ""


def summarize(output: Path, questions: Sequence[Question]) -> tuple[dict[str, float], list[dict]]:
    """Overall figures, and a breakdown by domain and by category, from a file of results, ours or the original's."""
    domains = {question.image: question.domain for question in questions}
    answers = [
        (domains.get(image, image.split("_")[0]), answer)
        for image, of_image in read_json(output, "results", dict[str, list[Answer]]).items()
        for answer in of_image
    ]
    if not answers:
        raise UserError(f"{output}: no question has been answered", remedy="check the ids of the captions")
    parts = [("domain", domain, [a for d, a in answers if d == domain]) for domain in sorted({d for d, _ in answers})]
    categories = sorted({answer.get("category") or "unknown" for _, answer in answers})
    parts += [
        ("category", category, [a for _, a in answers if (a.get("category") or "unknown") == category])
        for category in categories
    ]
    overall = _figures([answer for _, answer in answers])
    return overall, [{"part": kind, "name": name, **_figures(part)} for kind, name, part in parts]


def _figures(answers: Sequence[dict]) -> dict[str, float]:
    count = len(answers)
    return {
        "score": 100 * sum(answer["score"] for answer in answers) / count,
        "accuracy": 100 * sum(answer["is_correct"] for answer in answers) / count,
        "cannot_answer": 100 * sum(answer["is_cannot_answer"] for answer in answers) / count,
        "questions": count,
    }
