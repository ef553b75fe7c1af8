"""Makes questions about a picture for the reward `utility`, and keeps those that the picture, and it alone, answers.

As CapRL (arXiv 2509.22647) filters: the model that wrote a question must answer it right with the picture, and not
reliably without it; here under ORDERS orders of the options each.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future

from PIL import Image
from pydantic import ValidationError

from balcap_mega.config.schema import JudgeEndpoint
from balcap_mega.data.questions import LETTERS, ChoiceQuestion, QuestionEntry
from balcap_mega.errors import UserError
from balcap_mega.rewards.mllm import questions
from balcap_mega.rewards.mllm.background import BackgroundLoop
from balcap_mega.rewards.mllm.client import ChatClient, ClientCounters
from balcap_mega.rewards.mllm.dialect import remedy_for
from balcap_mega.rewards.mllm.failures import RequestFailed, Unusable
from balcap_mega.rewards.mllm.replies import Choice, Completion, usable_json

ORDERS = 2
PROMPTS = ("ask", "see", "guess")
AN_ANSWER = questions.BESIDE_VERDICTS + questions.A_VERDICT


class Written(questions.ReplyModel):
    question: str
    choices: list[str]
    answer: str


class WrittenQuestions(questions.ReplyModel):
    questions: list[Written]


class QuestionMaker:
    """Asks one vision model for `count` questions about each picture, and then to answer them."""

    def __init__(self, endpoint: JudgeEndpoint, count: int, *, backoff_seconds: float = 0.5):
        self.endpoint, self.count = endpoint, count
        self._client = ChatClient(endpoint, backoff_seconds=backoff_seconds)
        self._loop = BackgroundLoop("questions")

    def submit(self, record: str, image: Image.Image) -> Future[tuple[ChoiceQuestion, ...]]:
        """Those kept of a record's picture, perhaps none; the future raises RequestFailed where a reply is missing."""
        return self._loop.submit(self._make(record, questions.image_data_url(image)))

    def check(self) -> None:
        """Raises UserError, with the server's own words, where questions about a small picture are not answered."""
        image_url = questions.image_data_url(Image.new("RGB", (112, 112), "red"))
        try:
            self._loop.submit(self._write("check", image_url)).result()
        except RequestFailed as error:
            says = f"; it says: {error.said}" if error.said else ""
            raise UserError(
                f"the model {self.endpoint.model!r} does not answer: {error}{says}",
                remedy=remedy_for(error.said)
                or "check that the endpoint runs, serves that model with JSON-schema output, takes images and the key",
            ) from error

    def report(self) -> ClientCounters:
        return self._client.counters

    def close(self) -> None:
        self._loop.close(self._client.close)

    async def _make(self, record: str, image_url: str) -> tuple[ChoiceQuestion, ...]:
        written = await self._write(record, image_url)
        kept = await asyncio.gather(*(self._is_about_the_picture(each, record, image_url) for each in written))
        return tuple(question for question, keep in zip(written, kept, strict=True) if keep)

    async def _write(self, record: str, image_url: str) -> list[ChoiceQuestion]:
        data, schema = {"wanted": str(self.count)}, WrittenQuestions.model_json_schema()
        body = questions.body_of("ask", questions.prompt("ask"), data, schema, questions.LONGEST_LIST, image_url)
        return await self._client.ask(body, lambda reply: _usable(reply.choices[0])[: self.count], about=record)

    async def _is_about_the_picture(self, question: ChoiceQuestion, record: str, image_url: str) -> bool:
        seen = await self._answers(question, record, "see", image_url)
        return all(seen) and not all(await self._answers(question, record, "guess"))

    async def _answers(
        self, question: ChoiceQuestion, record: str, prompt: str, image_url: str | None = None
    ) -> list[bool]:
        """Whether each order's answer is right."""
        orders = [question.options(f"{record} {order}") for order in range(ORDERS)]
        return await asyncio.gather(*(self._is_right(question, each, record, prompt, image_url) for each in orders))

    async def _is_right(
        self, question: ChoiceQuestion, order: tuple[str, ...], record: str, prompt: str, image_url: str | None
    ) -> bool:
        options: Mapping[str, str] = dict(zip(LETTERS, order))
        data, schema = {"question": question.question, "options": options}, questions.choice_schema(len(options))
        body = questions.body_of(prompt, questions.prompt(prompt), data, schema, AN_ANSWER, image_url)

        def read(reply: Completion) -> bool:
            return questions.chosen(reply.choices[0], options) == question.answer

        return await self._client.ask(body, read, about=record, kind=prompt)


def _usable(choice: Choice) -> list[ChoiceQuestion]:
    """The questions that are in order; the others are left out. Raises Unusable where none is."""
    found = {}
    for written in usable_json(choice, WrittenQuestions).questions:
        try:
            question = QuestionEntry.model_validate(written.model_dump()).as_question()
        except ValidationError:
            continue
        found[question.question.casefold()] = question
    if not found:
        raise Unusable("off_schema")
    return list(found.values())
