"""What the judge is asked: five questions, each with its prompt, its data and the JSON schema its reply must fit.

Captions come from a model under training that is paid for good verdicts, so they reach the judge only as strings inside
a JSON object of the user message. No caption can close that object or spell a chat template's control token.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Generic, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, create_model

from balcap_mega.data.jsonl import Text
from balcap_mega.rewards.mllm.replies import Completion, WholeNumber, usable_json

# `<`, `>` and `|` spell control tokens of chat templates (<|im_end|>, </s>, <image>), brackets spell others ([INST]).
# None of them is needed by a JSON object of strings, so each can be escaped wherever it occurs.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>|[]"}
LONGEST_IMAGE_SIDE = 1536
MOST_ASSERTIONS = 128
HIGHEST_GRADE = 10


class ReplyModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Sentence = (
    Text  # not blank: checked here and not by the schema, for hosted APIs refuse one that bounds a string's length
)


class QuotedAssertion(ReplyModel):
    text: Sentence
    quote: str


class Split(ReplyModel):
    assertions: Annotated[list[QuotedAssertion], Field(max_length=MOST_ASSERTIONS)]


class Units(ReplyModel):
    units: Annotated[list[Sentence], Field(min_length=1, max_length=MOST_ASSERTIONS)]


class Grades(ReplyModel):
    clarity: Annotated[WholeNumber, Field(ge=0, le=HIGHEST_GRADE)]
    fluency: Annotated[WholeNumber, Field(ge=0, le=HIGHEST_GRADE)]
    coherency: Annotated[WholeNumber, Field(ge=0, le=HIGHEST_GRADE)]


class Found(ReplyModel):
    pointable: bool
    correct: bool


class Coverage(ReplyModel):
    covered: bool


Reply = TypeVar("Reply", bound=BaseModel)
Entry = TypeVar("Entry", bound=BaseModel)


@dataclass(frozen=True)
class Question(Generic[Reply]):
    """The body of a chat request, and how to read its answer."""

    body: dict[str, Any]
    reply: type[Reply]

    def accept(self, completion: Completion) -> Reply:
        """Raises Unusable for a reply that is refused, cut, not JSON, or not of the schema."""
        return usable_json(completion.choices[0], self.reply)


def split(caption: str) -> Question[Split]:
    return _question("split", {"caption": caption}, Split, 4096)


def verify(statements: Sequence[str], image_url: str) -> Question:
    return _question("verify", {"statements": _numbered(statements)}, *_one_each(Found, len(statements)), image_url)


def units(reference: str) -> Question[Units]:
    return _question("units", {"reference": reference}, Units, 4096)


def cover(facts: Sequence[str], caption: str) -> Question:
    data = {"caption": caption, "facts": _numbered(facts)}
    return _question("cover", data, *_one_each(Coverage, len(facts)))


def language(caption: str) -> Question[Grades]:
    return _question("language", {"caption": caption}, Grades, 128)


def entries(reply: BaseModel) -> list:
    """The numbered entries of a reply to `verify` or `cover`, in order."""
    return [entry for _, entry in reply]


def as_data(value: dict) -> str:
    """`value`, whose leaves are strings, as JSON that holds no control token, whatever the strings are."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    # A lone surrogate has no UTF-8 form, so no request could carry it.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(ESCAPES)


def image_data_url(image: Image.Image) -> str:
    """The image as a JPEG data URL, its longer side at most LONGEST_IMAGE_SIDE pixels."""
    image = image.convert("RGB")
    image.thumbnail((LONGEST_IMAGE_SIDE, LONGEST_IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def prompt(name: str) -> str:
    return files("balcap_mega.rewards.mllm").joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8").strip()


def _question(name: str, data: dict, reply: type[Reply], max_tokens: int, image_url: str | None = None) -> Question:
    content: Any = as_data(data)
    if image_url is not None:
        image = {"type": "image_url", "image_url": {"url": image_url}}
        content = [image, {"type": "text", "text": content}]
    schema = {"name": name, "schema": _schema(reply), "strict": True}
    body = {
        "messages": [{"role": "system", "content": prompt(name)}, {"role": "user", "content": content}],
        "response_format": {"type": "json_schema", "json_schema": schema},
        "temperature": 0,
        "seed": 0,
        "max_completion_tokens": max_tokens,
    }
    return Question(body, reply)


@cache
def _schema(reply: type[BaseModel]) -> dict[str, Any]:
    return reply.model_json_schema()


def _numbered(texts: Sequence[str]) -> dict[str, str]:
    return {str(number): text for number, text in enumerate(texts, start=1)}


@cache
def _one_each(entry: type[Entry], count: int) -> tuple[type[BaseModel], int]:
    """An object that must have the keys "1" to "count", one entry each; and the tokens such a reply may take."""
    fields: dict[str, Any] = {str(number): (entry, ...) for number in range(1, count + 1)}
    return create_model(f"{entry.__name__}OfEach", __base__=ReplyModel, **fields), 64 + 48 * count
