"""CaptionQA (arXiv 2511.21025): questions about an image, answered from its caption alone.

Reads and writes the formats of bronyayang/CaptionQA: captions as one JSON object {id: caption}, questions as rows of
the data set (JSON, JSON Lines or Parquet), results as one JSON object {id: [answer, …]} as the original writes them.

For the same usable replies the scores are the original's. Its quirks, each mended by `mend=True`:
- a question is taken for a yes/no question, and gets no "cannot answer" option, when "yes" and "no" occur anywhere in
  its choices ("eyes", "snow"), or when it starts with a verb such as "is": "Is the car red or blue?";
- of a reply with a line break within it only what follows the first one is read, so "B\\nbecause" is no answer;
- the first single letter of a reply counts, so "A red car: C" answers A;
- scores are rounded to four decimals before they are added;
- images without a caption are left out (they score 0 when mended).

Saner than the original, always: a refused, blank or cut reply is no wrong answer. It is asked again and, if that does
not help, counted as missing. A cut reply counts if it begins with its letter ("B. The red"), for four tokens are all
that the benchmark grants.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from balcap_mega.errors import UserError
from balcap_mega.evaluation.captionqa_questions import Question
from balcap_mega.evaluation.session import for_each, load_prompts, read_json, write_json
from balcap_mega.rewards.mllm.client import ChatClient
from balcap_mega.rewards.mllm.failures import Unusable
from balcap_mega.rewards.mllm.replies import Completion, usable_text

SAVE_EVERY = 50  # questions
PROMPTS = {"captionqa": ()}
PROTOCOL = 2  # raised when the same replies come to be scored otherwise
BEGINS_WITH_LETTER = re.compile(r"\W*[A-Z](?:[.):,*\n]|$)")


class Answer(TypedDict):
    """What is read of an answer in a file of results; more stands there."""

    __pydantic_config__ = ConfigDict(extra="allow")

    question: NotRequired[str]
    choices: NotRequired[list[Any]]
    ground_truth: NotRequired[Any]
    model_answer: NotRequired[str | None]
    score: float
    is_correct: bool
    is_cannot_answer: bool
    category: NotRequired[str | None]


@dataclass(frozen=True)
class CaptionQaRun:
    """Captions to question, and where the answers go."""

    questions: Sequence[Question]
    captions: dict[str, str]
    output: Path
    mend: bool = False
    prompts: Mapping[str, str] = field(default_factory=lambda: load_prompts(PROMPTS))
    max_tokens: int = 4

    async def run(self, client: ChatClient, progress: Callable[[], None] = lambda: None) -> Counter[str]:
        """Answer every question that has no answer in `output`; count those that got no usable reply, by reason.

        The answers of an image stand in its questions' order; one that is missing leaves the others where they are.
        """
        answers = self._earlier_answers()
        system = self.prompts["captionqa"].strip()
        unsaved = 0

        async def one(number: int) -> None:
            nonlocal unsaved
            if answers[number] is None:
                reply = await self._reply(client, system, self.questions[number])
                answers[number] = self.questions[number].result(reply, self.mend)
                unsaved += 1
                if unsaved >= SAVE_EVERY:
                    self._save(answers)
                    unsaved = 0
            progress()

        try:
            return await for_each(range(len(answers)), one, client.endpoint.concurrency)
        finally:
            self._save(answers)

    def _earlier_answers(self) -> list[Any]:
        """What `output` answers already, in the questions' order; None for each of the others.

        Raises UserError for an answer to another question.
        """
        found: dict[tuple[str, str], list[Answer]] = defaultdict(list)
        if self.output.exists():
            for image, of_image in read_json(self.output, "earlier results", dict[str, list[Answer]]).items():
                for answer in of_image:
                    about = answer.get("question"), answer.get("choices"), answer.get("ground_truth")
                    found[image, repr(about)].append(answer)
        answers = [
            found[question.image, question.key].pop(0) if found[question.image, question.key] else None
            for question in self.questions
        ]
        if left := next((key for key, over in found.items() if over), None):
            raise UserError(
                f"{self.output} holds an answer about {left[0]!r} to a question that is not asked",
                remedy=f"name another --output, or delete {self.output} to score anew",
            )
        return answers

    def _save(self, answers: Sequence[dict | None]) -> None:
        results: dict[str, list[dict]] = defaultdict(list)
        for question, answer in zip(self.questions, answers, strict=True):
            if answer is not None:
                results[question.image].append(answer)
        write_json(self.output, results)

    async def _reply(self, client: ChatClient, system: str, question: Question) -> str:
        if question.image not in self.captions:
            return ""
        prompt = question.prompt(self.captions[question.image])
        body = {
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}],
            "temperature": 0,
            "max_completion_tokens": self.max_tokens,
        }
        return await client.ask(body, _usable_answer)


def _usable_answer(completion: Completion) -> str:
    """The reply as it came, thoughts and all. Raises Unusable for what is no answer; see the top about cut replies."""
    choice = completion.choices[0]
    try:
        usable_text(choice)
    except Unusable as error:
        if error.reason != "truncated" or not BEGINS_WITH_LETTER.match(usable_text(choice, cut_is_fine=True).strip()):
            raise
    return choice.message.content.strip()


def summarize(
    output: Path, questions: Sequence[Question], without_caption: int = 0
) -> tuple[dict[str, float], list[dict]]:
    """Overall figures, and a breakdown by domain and by category, from a file of results, ours or the original's.

    without_caption: images that the captions left out, to stand beside the score
    """
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
    overall = {**_figures([answer for _, answer in answers]), "images_without_caption": without_caption}
    return overall, [{"part": kind, "name": name, **_figures(part)} for kind, name, part in parts]


def _figures(answers: Sequence[dict]) -> dict[str, float]:
    count = len(answers)
    return {
        "score": 100 * sum(answer["score"] for answer in answers) / count,
        "accuracy": 100 * sum(answer["is_correct"] for answer in answers) / count,
        "cannot_answer": 100 * sum(answer["is_cannot_answer"] for answer in answers) / count,
        "names_no_option": 100 * sum(answer.get("model_answer", "") is None for answer in answers) / count,
        "questions": count,
    }
