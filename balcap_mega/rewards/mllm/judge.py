"""A multimodal LLM as the judge of real images, behind any OpenAI-compatible endpoint.

caption ─► split into assertions ─► verify each in the image ─► precision
        ─► match the reference's units ────────────────────────► recall        all three at the same time
        ─► grade the language ─────────────────────────────────► linguistic
"""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from balcap_mega.config.schema import JudgeEndpoint, RewardConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.rewards.judge import COMPONENTS, Assertion, Judgement, Verdict
from balcap_mega.rewards.mllm import questions
from balcap_mega.rewards.mllm.background import BackgroundLoop, SharedWork
from balcap_mega.rewards.mllm.cache import ReplyCache
from balcap_mega.rewards.mllm.client import ChatClient, ClientCounters
from balcap_mega.rewards.mllm.failures import RequestFailed

T = TypeVar("T")
log = logging.getLogger(__name__)

# Groups whose encoded image and reference units are kept at hand: more than are judged at once.
GROUPS_AT_HAND = 256


@dataclass(frozen=True)
class JudgeReport:
    """Totals since the judge was made. `missing` counts captions by component, `failures` requests by reason."""

    captions: int
    requests: int
    cache_hits: int
    prompt_tokens: int
    completion_tokens: int
    retries: dict[str, int]
    failures: dict[str, int]
    missing: dict[str, int]


class MllmJudge:
    """Judges captions with the endpoints of a `RewardConfig`; see `balcap_mega.rewards.judge.Judge`.

    Requests of all captions run at the same time, at most `concurrency` an endpoint, on a thread of their own: submit
    a caption the moment it is finished. A component whose requests fail is None in the Judgement, counted in
    `report()` and logged with the request ids.
    """

    def __init__(self, config: RewardConfig, *, backoff_seconds: float = 0.5):
        if config.endpoint is None:
            raise UserError("rewards.endpoint is not set", remedy="give its base_url and model")
        self._cache = ReplyCache(config.cache_dir) if config.cache_dir else None
        clients: dict[JudgeEndpoint, ChatClient] = {}
        self._client: dict[str, ChatClient] = {}
        for component in COMPONENTS:
            endpoint = config.component_endpoints.get(component, config.endpoint)
            if endpoint not in clients:
                clients[endpoint] = ChatClient(endpoint, self._cache, backoff_seconds)
            self._client[component] = clients[endpoint]
        self._clients = list(clients.values())
        self._images = SharedWork(GROUPS_AT_HAND)
        self._units = SharedWork(GROUPS_AT_HAND)
        self._captions = 0
        self._missing: Counter[str] = Counter()
        self._loop = BackgroundLoop("mllm-judge")

    def submit(self, record: CaptionRecord, caption: str) -> Future[Judgement]:
        return self._loop.submit(self._judge(record, caption))

    def submit_units(self, reference: str) -> Future[tuple[str, ...]]:
        """The reference's units; the future raises RequestFailed when the endpoint gives none."""
        return self._loop.submit(self._reference_units(reference))

    def check(self) -> None:
        """Ask each endpoint one small question. Raises UserError if one does not answer as the judge needs it."""
        for client in self._clients:
            probe = questions.language("A cat sits on a red sofa.")
            try:
                self._loop.submit(client.ask(probe.body, probe.accept, use_cache=False)).result()
            except RequestFailed as error:
                raise UserError(
                    f"the judge {client.endpoint.model!r} does not answer: {error}",
                    remedy="check that the endpoint runs, serves that model with JSON-schema output, and takes the key",
                ) from error

    def report(self) -> JudgeReport:
        total = ClientCounters()
        for client in self._clients:
            for name in ("requests", "cache_hits", "prompt_tokens", "completion_tokens"):
                setattr(total, name, getattr(total, name) + getattr(client.counters, name))
            total.retries.update(client.counters.retries)
            total.failures.update(client.counters.failures)
        return JudgeReport(
            self._captions,
            total.requests,
            total.cache_hits,
            total.prompt_tokens,
            total.completion_tokens,
            dict(total.retries),
            dict(total.failures),
            dict(self._missing),
        )

    def close(self) -> None:
        """Cancel what is still being judged and free the connections."""
        self._loop.close(self._close_clients)

    async def _close_clients(self) -> None:
        for client in self._clients:
            await client.close()
        if self._cache is not None:
            self._cache.close()

    async def _judge(self, record: CaptionRecord, caption: str) -> Judgement:
        self._captions += 1
        assertions, covered, grades = await asyncio.gather(
            self._or_missing("precision", record, self._assertions(record, caption)),
            self._or_missing("recall", record, self._covered(record, caption)),
            self._or_missing("linguistic", record, self._grades(caption)),
        )
        return Judgement(assertions, covered, *(grades or (None, None, None)))

    async def _or_missing(self, component: str, record: CaptionRecord, work: Coroutine[Any, Any, T]) -> T | None:
        try:
            return await work
        except RequestFailed as error:
            self._missing[component] += 1
            log.warning("%s of a caption of record %r is missing: %s", component, record.id, error)
            return None

    async def _ask(self, component: str, question: questions.Question[T]) -> T:
        return await self._client[component].ask(question.body, question.accept)

    async def _assertions(self, record: CaptionRecord, caption: str) -> tuple[Assertion, ...]:
        if not caption.strip():
            return ()
        # The image is encoded while the caption is split; all captions of a group share one encoding.
        image_url, reply = await asyncio.gather(
            self._image_url(record), self._ask("precision", questions.split(caption))
        )
        # A claim made twice is judged once: saying a true thing again earns nothing.
        claims = list({a.text.strip().casefold(): a for a in reversed(reply.assertions)}.values())[::-1]
        if not claims:
            return ()
        reply = await self._ask("precision", questions.verify([a.text for a in claims], image_url))
        return tuple(
            Assertion(claim.text, *find_quote(caption, claim.quote), _verdict(found))
            for claim, found in zip(claims, questions.entries(reply), strict=True)
        )

    async def _image_url(self, record: CaptionRecord) -> str:
        async def encode():
            # The image goes with its encoding: as long as it is kept, its id() names no other image.
            return record.image, await asyncio.to_thread(questions.image_data_url, record.image)

        _, url = await self._images.get(id(record.image), encode)
        return url

    async def _covered(self, record: CaptionRecord, caption: str) -> tuple[bool, ...]:
        units = record.units if record.units is not None else await self._reference_units(record.reference)
        if not units or not caption.strip():
            return (False,) * len(units)
        reply = await self._ask("recall", questions.cover(units, caption))
        return tuple(entry.covered for entry in questions.entries(reply))

    async def _reference_units(self, reference: str) -> tuple[str, ...]:
        async def extract():
            reply = await self._ask("recall", questions.units(reference))
            return tuple(dict.fromkeys(unit.strip() for unit in reply.units))

        return await self._units.get(reference, extract)

    async def _grades(self, caption: str) -> tuple[float, float, float]:
        if not caption.strip():
            return 0.0, 0.0, 0.0
        grades = await self._ask("linguistic", questions.language(caption))
        return tuple(grade / questions.HIGHEST_GRADE for grade in (grades.clarity, grades.fluency, grades.coherency))


def _verdict(found: questions.Found) -> Verdict:
    if not found.pointable:
        return Verdict.NOT_POINTABLE
    return Verdict.VERIFIED if found.correct else Verdict.WRONG


def find_quote(caption: str, quote: str) -> tuple[int, int]:
    """Where `quote` stands in `caption`, ignoring case; the whole caption where a judge did not quote exactly."""
    found = re.search(re.escape(quote.strip()), caption, re.IGNORECASE)
    return found.span() if found and quote.strip() else (0, len(caption))
