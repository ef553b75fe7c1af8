"""A multimodal LLM as the judge of real images, behind any OpenAI-compatible endpoint.

caption ─► split into assertions ─► verify each in the image ─► precision
        ─► match the reference's units ────────────────────────► recall        all at the same time
        ─► grade the language ─────────────────────────────────► linguistic
        ─► answer the record's questions from it alone ────────► utility

Only what the components of a run name is asked.
"""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Collection, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from balcap_mega.config.schema import JudgeQuestion, RewardConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.rewards.judge import Assertion, Judgement, Verdict
from balcap_mega.rewards.mllm import questions
from balcap_mega.rewards.mllm.background import BackgroundLoop, SharedWork
from balcap_mega.rewards.mllm.cache import ReplyCache
from balcap_mega.rewards.mllm.client import ChatClient, ClientCounters
from balcap_mega.rewards.mllm.dialect import remedy_for
from balcap_mega.rewards.mllm.failures import RequestFailed

T = TypeVar("T")
log = logging.getLogger(__name__)

# Groups whose encoded image and reference units are kept at hand: more than are judged at once.
GROUPS_AT_HAND = 256


@dataclass
class JudgeReport(ClientCounters):
    """Totals since the judge was made, over all endpoints; `failures` counts requests given up, by reason.

    captions: submitted; `missing` counts those without a component, by component
    limit:    requests that may be under way at this moment
    """

    captions: int = 0
    limit: int = 0
    missing: Counter[str] = field(default_factory=Counter)


class MllmJudge:
    """Judges captions with the endpoints of a `RewardConfig`; see `balcap_mega.rewards.judge.Judge`.

    Requests of all captions run at the same time, as many as `concurrency` and the endpoint allow, on a thread of their
    own: submit a caption the moment it is finished. Where they wait, those about a caption go before those about one
    that was submitted later: captions sampled a step ahead do not hold up those that a step waits for. A component
    whose requests fail is None in the Judgement, counted in `report()` and logged with the request ids.

    sharers: judges that ask the same endpoints for one job, each with its share of their concurrency
    """

    def __init__(self, config: RewardConfig, *, backoff_seconds: float = 0.5, sharers: int = 1):
        if config.endpoint is None:
            raise UserError("rewards.endpoint is not set", remedy="give its base_url and model")
        self._cache = ReplyCache(config.cache_dir) if config.cache_dir else None
        self._clients: list[ChatClient] = []
        self._client: dict[str, ChatClient] = {}
        for question, endpoint in config.endpoints().items():
            client = next((client for client in self._clients if client.endpoint == endpoint), None)
            if client is None:
                client = ChatClient(endpoint, self._cache, backoff_seconds, sharers)
                self._clients.append(client)
            self._client[question] = client
        self.config = config
        self._images = SharedWork(GROUPS_AT_HAND)
        self._units = SharedWork(GROUPS_AT_HAND)
        self._captions = 0
        self._missing: Counter[str] = Counter()
        self._loop = BackgroundLoop("mllm-judge")

    def submit(self, record: CaptionRecord, caption: str, *, quotes: bool = False) -> Future[Judgement]:
        """quotes: also ask where in the caption each assertion stands, for a report that shows it."""
        return self._loop.submit(self._judge(record, caption, quotes))

    def submit_units(self, reference: str) -> Future[tuple[str, ...]]:
        """The reference's units; the future raises RequestFailed when the endpoint gives none."""
        return self._loop.submit(self._reference_units(reference))

    def check(self, asked: Collection[JudgeQuestion] | None = None) -> None:
        """Ask one small question of each kind that will be `asked`, of the endpoint it will go to, a picture included.

        None: all that the components need.
        Raises UserError with the server's own words if one is not answered as the judge needs it.
        """
        for probe in questions.samples():
            if probe.name not in (self.config.questions if asked is None else asked):
                continue
            client = self._client[probe.name]
            try:
                self._loop.submit(client.ask(probe.body, probe.accept, use_cache=False)).result()
            except RequestFailed as error:
                says = f", about {probe.name}; it says: {error.said}" if error.said else f", about {probe.name}"
                raise UserError(
                    f"the judge {client.endpoint.model!r} does not answer: {error}{says}",
                    remedy=remedy_for(error.said, self.config.endpoint_key(probe.name))
                    or "check that the endpoint runs, serves that model with JSON-schema output, takes images where "
                    "verify goes, and takes the key",
                ) from error

    def report(self) -> JudgeReport:
        total = JudgeReport(captions=self._captions, missing=self._missing.copy())
        for client in self._clients:
            total.add(client.counters)
            total.limit += client.limit
        return total

    def close(self) -> None:
        """Cancel what is still being judged and free the connections."""
        self._loop.close(self._close_clients)

    async def _close_clients(self) -> None:
        for client in self._clients:
            await client.close()
        if self._cache is not None:
            self._cache.close()

    async def _judge(self, record: CaptionRecord, caption: str, quotes: bool) -> Judgement:
        self._captions += 1
        number = self._captions
        work = {
            "precision": lambda: self._assertions(record, caption, quotes, number),
            "recall": lambda: self._covered(record, caption, number),
            "linguistic": lambda: self._grades(record, caption, number),
            "utility": lambda: self._answers(record, caption, number),
        }
        asked = self.config.judged
        replies = await asyncio.gather(*(self._or_missing(name, record, work[name]()) for name in asked))
        found = dict(zip(asked, replies, strict=True))
        grades = found.get("linguistic") or (None, None, None)
        covered, units = found.get("recall") or (None, None)
        return Judgement(found.get("precision"), covered, *grades, answers=found.get("utility"), units=units)

    async def _or_missing(self, component: str, record: CaptionRecord, work: Coroutine[Any, Any, T]) -> T | None:
        try:
            return await work
        except RequestFailed as error:
            self._missing[component] += 1
            log.warning("%s of a caption of record %r is missing: %s", component, record.id, error)
            return None

    async def _ask(self, question: questions.Question[T], record: CaptionRecord | None = None, number: int = 0) -> T:
        """An image's questions go to one address, whose prefix cache has the image and the reference's facts.

        number: of the caption that it is about, as they were submitted
        """
        about = "" if record is None else record.id
        return await self._client[question.name].ask(
            question.body, question.accept, about=about, kind=question.name, priority=number
        )

    async def _assertions(
        self, record: CaptionRecord, caption: str, quotes: bool, number: int
    ) -> tuple[Assertion, ...]:
        if not caption.strip():
            return ()
        # The image is encoded while the caption is split; all captions of a group share one encoding.
        image_url, found = await asyncio.gather(
            self._image_url(record), self._ask(questions.split(caption, quotes=quotes), record, number)
        )
        # A claim made twice is judged once: saying a true thing again earns nothing.
        claims = {text.strip().casefold(): (text, place) for text, place in reversed(_placed(found, caption))}
        texts, places = zip(*reversed(claims.values()), strict=True) if claims else ((), ())
        if found.too_many:
            verdicts = [Verdict.UNCHECKED] * len(texts)  # nobody could check them all, and that must not pay
        elif texts:
            answers = await self._ask(questions.verify(texts, image_url), record, number)
            verdicts = [_verdict(answer, self.config.pointability) for answer in answers]
        else:
            verdicts = ()
        return tuple(
            Assertion(text, start, stop, verdict)
            for text, (start, stop), verdict in zip(texts, places, verdicts, strict=True)
        )

    async def _image_url(self, record: CaptionRecord) -> str:
        async def encode():
            # The image goes with its encoding: as long as it is kept, its id() names no other image.
            return record.image, await asyncio.to_thread(questions.image_data_url, record.image)

        _, url = await self._images.get(id(record.image), encode)
        return url

    async def _covered(
        self, record: CaptionRecord, caption: str, number: int
    ) -> tuple[tuple[bool, ...], tuple[str, ...]]:
        """Which units are covered, and the units."""
        units = record.units
        if units is None:
            units = await self._reference_units(record.reference, record, number)
        if not units or not caption.strip():
            return (False,) * len(units), units
        return tuple(await self._ask(questions.cover(units, caption), record, number)), units

    async def _reference_units(
        self, reference: str, record: CaptionRecord | None = None, number: int = 0
    ) -> tuple[str, ...]:
        async def extract():
            units = await self._ask(questions.units(reference), record, number)
            return tuple(dict.fromkeys(unit.strip() for unit in units))

        return await self._units.get(reference, extract)

    async def _grades(self, record: CaptionRecord, caption: str, number: int) -> tuple[float, float, float]:
        if not caption.strip():
            return 0.0, 0.0, 0.0
        grades = await self._ask(questions.language(caption), record, number)
        highest = questions.HIGHEST_GRADE
        return grades.clarity / highest, grades.fluency / highest, grades.coherency / highest

    async def _answers(self, record: CaptionRecord, caption: str, number: int) -> tuple[float, ...]:
        """What each of the record's questions earns; all of them or, where one gets no usable reply, none."""
        asked = record.questions or ()
        if not caption.strip():
            return (0.0,) * len(asked)
        chosen = await asyncio.gather(
            *(self._ask(questions.answer(caption, question, record.id), record, number) for question in asked)
        )
        return tuple(question.credit(choice) for question, choice in zip(asked, chosen, strict=True))


def _verdict(found: questions.Found, pointability: bool) -> Verdict:
    """By `rewards.pointability`."""
    if pointability and not found.pointable:
        return Verdict.NOT_POINTABLE
    return Verdict.VERIFIED if found.correct else Verdict.WRONG


def _placed(claims: questions.Claims, caption: str) -> list[tuple[str, tuple[int, int]]]:
    """Each claim with its place in the caption: of its quote, or where its own words stand."""
    if claims.quotes is None:
        return [(text, find_text(caption, text) or (0, 0)) for text in claims.texts]
    return [(text, find_quote(caption, quote)) for text, quote in zip(claims.texts, claims.quotes, strict=True)]


def find_text(caption: str, text: str) -> tuple[int, int] | None:
    """Where `text` stands in `caption`, ignoring case."""
    found = re.search(re.escape(text.strip()), caption, re.IGNORECASE)
    return found.span() if found and text.strip() else None


def find_quote(caption: str, quote: str) -> tuple[int, int]:
    """Where `quote` stands; the whole caption where a judge did not quote exactly."""
    return find_text(caption, quote) or (0, len(caption))
