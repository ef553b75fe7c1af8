"""What the judge is asked: six questions, each with its prompt, its data and the JSON schema its reply must fit.

A reply holds a verdict for each numbered item and says which, in a few tokens: "1R2W3V" for three statements. One that
leaves a number out, repeats it or adds one is not used. What requests have in common comes first in them, for the
server's prefix cache: the instructions, then the image or the reference's facts, then the caption's own.

Captions come from a model under training that is paid for good verdicts, so they reach the judge only as strings inside
a JSON object of the user message. No caption can close that object or spell a chat template's control token.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Generic, TypeVar

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from balcap_mega.config.schema import JudgeQuestion
from balcap_mega.data.questions import CANNOT_ANSWER, LETTERS, ChoiceQuestion, Text
from balcap_mega.rewards.mllm.failures import Unusable
from balcap_mega.rewards.mllm.replies import WHOLE, Choice, Completion, usable_json

# `<`, `>` and `|` spell control tokens of chat templates (<|im_end|>, </s>, <image>), brackets spell others ([INST]).
# None of them is needed by a JSON object of strings, so each can be escaped wherever it occurs.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>|[]"}
LONGEST_IMAGE_SIDE = 1536
MOST_ASSERTIONS = 128
SHORTEST_ASSERTION = 2  # characters of a caption: one that is shorter than so many a claim has not made them
HIGHEST_GRADE = 10
FOUND = {  # what a letter says of a statement: pointable, correct
    "R": (True, True),
    "W": (True, False),
    "V": (False, True),
    "X": (False, False),
}
COVERED = {"Y": True, "N": False}
LONGEST_LIST = 4096  # tokens of a reply that lists sentences
ENTRY = re.compile(r"([1-9][0-9]*)[\s:=.)-]*([A-Z])(?![A-Z])")
BETWEEN = " \t\r\n,;|."
BESIDE_VERDICTS, A_VERDICT = 64, 8  # tokens of a reply that is numbered, at most


class ReplyModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Sentence = (
    Text  # not blank: checked here and not by the schema, for hosted APIs refuse one that bounds a string's length
)


class Split(ReplyModel):
    assertions: Annotated[list[Sentence], Field(max_length=MOST_ASSERTIONS + 1)]  # one more: there are too many


class QuotedAssertion(ReplyModel):
    text: Sentence
    quote: str


class QuotedSplit(ReplyModel):
    assertions: Annotated[list[QuotedAssertion], Field(max_length=MOST_ASSERTIONS + 1)]


class Units(ReplyModel):
    units: Annotated[list[Sentence], Field(min_length=1, max_length=MOST_ASSERTIONS)]


Grade = Annotated[int, Field(ge=0, le=HIGHEST_GRADE), WHOLE]


class Grades(ReplyModel):
    clarity: Grade
    fluency: Grade
    coherency: Grade


class Verdicts(ReplyModel):
    verdicts: str


class Chosen(ReplyModel):
    answer: str


@dataclass(frozen=True)
class Claims:
    """What a caption asserts, in its order; `quotes` are the words that assert it, where they were asked for.

    too_many: the caption asserts more than MOST_ASSERTIONS, of which these are the first
    """

    texts: tuple[str, ...]
    quotes: tuple[str, ...] | None = None
    too_many: bool = False


@dataclass(frozen=True)
class Found:
    """About one statement: could one point at what settles it, and does the image show it?"""

    pointable: bool
    correct: bool


Answer = TypeVar("Answer")
T = TypeVar("T")


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """The body of a chat request, and how its answer is read: `read` raises Unusable for one that it cannot use."""

    name: JudgeQuestion
    body: dict[str, Any]
    read: Callable[[Choice], Answer]

    def accept(self, completion: Completion) -> Answer:
        return self.read(completion.choices[0])


def split(caption: str, *, quotes: bool = False) -> Question[Claims]:
    """What the caption asserts. Quotes double the reply: they are for a reader who is shown where each claim stands."""
    form, name = (QuotedSplit, "split_quotes") if quotes else (Split, "split")
    instructions = f"{prompt('split')}\n\n{prompt('split_quotes')}" if quotes else prompt("split")
    body = body_of(name, instructions, {"caption": caption}, form.model_json_schema(), LONGEST_LIST)
    return Question("split", body, lambda choice: _claims(choice, form, caption))


def verify(statements: Sequence[str], image_url: str) -> Question[list[Found]]:
    body = _verdict_body("verify", {"statements": _numbered(statements)}, len(statements), FOUND, image_url)
    return Question("verify", body, lambda choice: [Found(*v) for v in _verdicts(choice, len(statements), FOUND)])


def units(reference: str) -> Question[tuple[str, ...]]:
    data = {"reference": reference}
    body = body_of("units", prompt("units"), data, Units.model_json_schema(), LONGEST_LIST)
    return Question("units", body, lambda choice: tuple(usable_json(choice, Units).units))


def cover(facts: Sequence[str], caption: str) -> Question[list[bool]]:
    data = {"facts": _numbered(facts), "caption": caption}
    body = _verdict_body("cover", data, len(facts), COVERED)
    return Question("cover", body, lambda choice: _verdicts(choice, len(facts), COVERED))


def language(caption: str) -> Question[Grades]:
    body = body_of("language", prompt("language"), {"caption": caption}, Grades.model_json_schema(), 128)
    return Question("language", body, lambda choice: usable_json(choice, Grades))


def answer(caption: str, asked: ChoiceQuestion, record: str) -> Question[str | None]:
    """Which of its choices the caption leads to; None for "cannot answer". record: the id, which orders the options"""
    options = dict(zip(LETTERS, asked.options(record)))
    data = {"caption": caption, "question": asked.question, "options": options}
    body = body_of("answer", prompt("answer"), data, choice_schema(len(options)), BESIDE_VERDICTS + A_VERDICT)
    return Question("answer", body, lambda choice: chosen(choice, options))


def samples() -> tuple[Question, ...]:
    """A small one of each kind, about a picture made for it: what an endpoint is tried with."""
    caption = "A cat sits on a red sofa."
    picture = image_data_url(Image.new("RGB", (112, 112), "red"))
    return (
        language(caption),
        units(caption),
        cover((caption,), caption),
        split(caption),
        verify(("cat on sofa", "sofa red"), picture),
        answer(caption, ChoiceQuestion("What colour is the sofa?", ("red", "blue"), "red"), ""),
    )


def _claims(choice: Choice, form: type[Split] | type[QuotedSplit], caption: str) -> Claims:
    try:
        found = usable_json(choice, form).assertions
    except Unusable:
        if (beginning := _first_claims(choice, form)) is None:
            raise
        found = beginning
    too_many = len(found) > MOST_ASSERTIONS
    if too_many and len(caption) < SHORTEST_ASSERTION * MOST_ASSERTIONS:
        raise Unusable("off_schema")  # the judge has run away
    found = found[:MOST_ASSERTIONS]
    if form is Split:
        return Claims(tuple(found), None, too_many)
    quoted = [claim for claim in found if isinstance(claim, QuotedAssertion)]
    return Claims(tuple(claim.text for claim in quoted), tuple(claim.quote for claim in quoted), too_many)


def _first_claims(choice: Choice, form: type[Split] | type[QuotedSplit]) -> list | None:
    """The first MOST_ASSERTIONS + 1 of a reply that holds at least so many, cut or not."""
    text = choice.message.content or ""
    try:
        partial = from_json(text[text.index("{") :], allow_partial=True)
        return form.model_validate({"assertions": partial["assertions"][: MOST_ASSERTIONS + 1]}).assertions
    except (ValueError, TypeError, KeyError):
        return None


def _verdicts(choice: Choice, count: int, letters: Mapping[str, T]) -> list[T]:
    """What stands for each number. Raises Unusable unless every number from 1 to `count` has one letter, in order."""
    reply = usable_json(choice, Verdicts).verdicts.upper()
    found = ENTRY.findall(reply)
    numbered = [number for number, _ in found] == [str(number) for number in range(1, count + 1)]
    if not numbered or ENTRY.sub("", reply).strip(BETWEEN) or not {letter for _, letter in found} <= letters.keys():
        raise Unusable("off_schema")
    return [letters[letter] for _, letter in found]


def chosen(choice: Choice, options: Mapping[str, str]) -> str | None:
    letter = usable_json(choice, Chosen).answer.strip(" .)\n").upper()
    if letter not in options:
        raise Unusable("off_schema")
    return None if options[letter] == CANNOT_ANSWER else options[letter]


def as_data(value: dict) -> str:
    """`value`, whose leaves are strings, as JSON that holds no control token, whatever the strings are."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    # A lone surrogate has no UTF-8 form, so no request could carry it.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(ESCAPES)


def image_data_url(image: Image.Image) -> str:
    """The image, upright, as a JPEG data URL; its longer side at most LONGEST_IMAGE_SIDE pixels."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((LONGEST_IMAGE_SIDE, LONGEST_IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def prompt(name: str) -> str:
    return files("balcap_mega.rewards.mllm").joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8").strip()


def body_of(
    name: str, instructions: str, data: dict, schema: dict[str, Any], max_tokens: int, image_url: str | None = None
) -> dict[str, Any]:
    content: Any = as_data(data)
    if image_url is not None:
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": content}]
    return {
        "messages": [{"role": "system", "content": instructions}, {"role": "user", "content": content}],
        "response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}},
        "temperature": 0,
        "seed": 0,
        "max_completion_tokens": max_tokens,
    }


def _verdict_body(
    name: str, data: dict, count: int, letters: Iterable[str], image_url: str | None = None
) -> dict[str, Any]:
    schema = _verdict_schema(count, "".join(letters))
    return body_of(name, prompt(name), data, schema, BESIDE_VERDICTS + A_VERDICT * count, image_url)


@cache
def _verdict_schema(count: int, letters: str) -> dict[str, Any]:
    """Under constrained decoding no other string than one with a letter for each number can be written."""
    schema = Verdicts.model_json_schema()
    pattern = "".join(f"{number}[{letters}]" for number in range(1, count + 1))
    verdicts = schema["properties"]["verdicts"] | {"pattern": f"^{pattern}$"}
    return schema | {"properties": {"verdicts": verdicts}}


@cache
def choice_schema(count: int) -> dict[str, Any]:
    schema = Chosen.model_json_schema()
    letter = schema["properties"]["answer"] | {"enum": list(LETTERS[:count])}
    return schema | {"properties": {"answer": letter}}


def _numbered(texts: Sequence[str]) -> dict[str, str]:
    return {str(number): text for number, text in enumerate(texts, start=1)}
