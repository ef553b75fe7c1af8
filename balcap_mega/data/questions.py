"""Questions with options about a picture: what a record holds for the reward `utility`, and what an answer is worth."""

from dataclasses import dataclass
from random import Random
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CANNOT_ANSWER = "Cannot answer from the caption"
MOST_CHOICES = len(LETTERS) - 1  # beside CANNOT_ANSWER
FORM = 'a question is {"question": text, "choices": [two or more texts, all different], "answer": one of the choices}'


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question about a picture; `answer` is one of its `choices`, no two of which are alike."""

    question: str
    choices: tuple[str, ...]
    answer: str

    def options(self, record: str) -> tuple[str, ...]:
        """Its choices and CANNOT_ANSWER in the order in which they are shown: a function of the record's id and the
        question alone, so that all captions of a picture meet the same order, before and after an interruption.
        """
        shown = [*self.choices, CANNOT_ANSWER]
        Random(repr((record, self.question, self.choices))).shuffle(shown)
        return tuple(shown)

    def credit(self, chosen: str | None) -> float:
        """Of an answer, one of `choices` or None for "cannot answer": see `utility`."""
        if chosen is None:
            return 0.0
        return 1.0 if chosen == self.answer else -1.0 / (len(self.choices) - 1)


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("blank")
    return text


Text = Annotated[str, AfterValidator(not_blank)]


class QuestionEntry(BaseModel):
    """A question as data files hold it, in CaptionQA's names."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: Text
    choices: Annotated[list[Text], Field(min_length=2, max_length=MOST_CHOICES)]
    answer: str

    @model_validator(mode="after")
    def answerable(self):
        kept = [choice.strip().casefold() for choice in (*self.choices, CANNOT_ANSWER)]
        if twice := [choice for choice in self.choices if kept.count(choice.strip().casefold()) > 1]:
            raise ValueError(f"choices hold {twice[0]!r} twice, or what every question is given: {CANNOT_ANSWER!r}")
        if self.answer.strip() not in [choice.strip() for choice in self.choices]:
            raise ValueError(f"answer {self.answer!r} is none of the choices")
        return self

    def as_question(self) -> ChoiceQuestion:
        choices = tuple(choice.strip() for choice in self.choices)
        return ChoiceQuestion(self.question.strip(), choices, self.answer.strip())

    @classmethod
    def of(cls, question: ChoiceQuestion) -> "QuestionEntry":
        return cls(question=question.question, choices=list(question.choices), answer=question.answer)


_ENTRIES = TypeAdapter(list[QuestionEntry])


def as_questions(entries: Any) -> tuple[ChoiceQuestion, ...]:
    """Raises ValueError, whose text says which is wrong and how: `.3.choices: …`."""
    try:
        return tuple(entry.as_question() for entry in _ENTRIES.validate_python(entries))
    except ValidationError as error:
        raise ValueError(problem_of(error)) from None


def problem_of(error: ValidationError) -> str:
    """`.3.choices: …`, of the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    return "".join(f".{part}" for part in first["loc"]) + f": {first['msg'].removeprefix('Value error, ')}"
