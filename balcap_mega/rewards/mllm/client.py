"""A chat client for OpenAI-compatible endpoints: bounded concurrency, retries, and a name for every failure."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from pydantic import ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from balcap_mega.config.schema import JudgeEndpoint
from balcap_mega.rewards.mllm.addresses import Address, Addresses
from balcap_mega.rewards.mllm.cache import ReplyCache
from balcap_mega.rewards.mllm.dialect import as_sent
from balcap_mega.rewards.mllm.failures import AttemptFailed, RequestFailed, Unusable
from balcap_mega.rewards.mllm.pressure import Dismissed
from balcap_mega.rewards.mllm.replies import Completion
from balcap_mega.rewards.mllm.transport import Transport

T = TypeVar("T")
log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 60.0
# Greedy decoding would repeat an unusable reply; the next attempts sample, each with its own fixed seed.
SECOND_OPINION_TEMPERATURE = 0.3
TOO_MUCH = ("timeout", "http_429", "http_503")  # an address that is asked too much says so
LEFT_OUT = "left_out"  # while this request stood in line for the address
BROKEN = ("timeout", "connection", "http_500", "http_502", "http_503", "http_504", LEFT_OUT)  # another may do better


@dataclass
class ClientCounters:
    """What a client has spent and met so far. `failures` counts requests given up, by their last reason.

    prompt_tokens:  read by the judge; of these `cached_tokens` stood in its prefix cache, where the server says so
    waited_seconds: that requests stood in line for a place, summed over requests
    moved:          requests that one address failed and another was asked
    """

    requests: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    waited_seconds: float = 0.0
    moved: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, other: "ClientCounters") -> None:
        for name in (each.name for each in fields(ClientCounters)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class ChatClient:
    """Asks one endpoint. Create it anywhere, use it on one event loop, and `await close()` it there.

    backoff_seconds: mean of the first back-off; it doubles with each attempt, with full jitter, up to a minute.
    sharers:         clients that ask this endpoint for one job: each takes its share of `concurrency`
    Raises UserError for a key variable that is not set.
    """

    def __init__(
        self,
        endpoint: JudgeEndpoint,
        cache: ReplyCache | None = None,
        backoff_seconds: float = 0.5,
        sharers: int = 1,
    ):
        self.endpoint = endpoint
        self.counters = ClientCounters()
        share = max(endpoint.concurrency // sharers, 1)
        self._transport = Transport(endpoint)
        self._addresses = Addresses(endpoint.addresses, share, self._transport.answers)
        self._cache = cache
        self._backoff = wait_random_exponential(multiplier=2 * backoff_seconds, max=LONGEST_WAIT_SECONDS)

    @property
    def limit(self) -> int:
        """Requests that may be under way at this moment, over all sound addresses."""
        return sum(int(address.limit.limit) for address in self._addresses.all if address.sound)

    async def close(self) -> None:
        await self._addresses.close()
        await self._transport.close()

    async def ask(
        self,
        body: dict[str, Any],
        accept: Callable[[Completion], T],
        *,
        use_cache: bool = True,
        about: str = "",
        kind: str = "",
        priority: int = 0,
    ) -> T:
        """POST `body` (the model's name is added) and return `accept(completion)`.

        body:  as OpenAI documents chat completions; the endpoint's dialect is applied here
        about: what requests with a common beginning share, such as an image: they go to one address
        kind:  of question; how long its answers take is compared with others of its kind
        priority: the lowest goes first where requests wait for a place
        `accept` raises `Unusable` to have the request tried again. Raises RequestFailed after the last attempt, or at
        once where trying again cannot help (a key or a model that the endpoint does not know).
        """
        sent = as_sent(body, self.endpoint.model, self.endpoint.dialect)
        encoded = json.dumps(sent).encode()
        content = hashlib.sha256(encoded).hexdigest()
        key = about or content
        cache = self._cache if use_cache else None
        places = [_cache_key(address.url, content) for address in self._addresses.order(key)]
        if cache is not None and (kept := cache.get(places)) is not None:
            try:
                accepted = accept(Completion.model_validate_json(kept))
            except (ValidationError, Unusable):
                log.warning("a reply in the cache is not usable and is asked for again")
            else:
                self.counters.cache_hits += 1
                return accepted
        greedy = body.get("temperature") == 0
        failed: list[AttemptFailed] = []
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(1 + self.endpoint.max_retries),
                wait=self._wait,
                retry=retry_if_exception(lambda error: isinstance(error, AttemptFailed) and error.retry),
                reraise=True,
            ):
                with attempt:
                    if failed:
                        self.counters.retries[failed[-1].reason] += 1
                    number = len(failed)
                    if greedy and failed and isinstance(failed[-1], Unusable):
                        body = {**body, "temperature": SECOND_OPINION_TEMPERATURE, "seed": number}
                        encoded = json.dumps(as_sent(body, self.endpoint.model, self.endpoint.dialect)).encode()
                    request_id = f"{content[:16]}-{number}"
                    try:
                        completion, request_id, url = await self._post_somewhere(
                            encoded, request_id, key, kind, priority
                        )
                        accepted = accept(completion)
                    except AttemptFailed as error:
                        error.request_id = error.request_id or request_id
                        failed.append(error)
                        raise
            if cache is not None:
                cache.put(_cache_key(url, content), completion.model_dump_json())
            return accepted  # pyright: ignore[reportReturnType] (the loop ends with it, or raises)
        except AttemptFailed as error:
            self.counters.failures[error.reason] += 1
            reasons, ids = [e.reason for e in failed], [e.request_id for e in failed]
            raise RequestFailed(reasons, ids, error.said) from error

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        hint = error.retry_after if isinstance(error, AttemptFailed) else 0.0
        return max(self._backoff(state), min(hint, LONGEST_WAIT_SECONDS))

    async def _post_somewhere(
        self, body: bytes, request_id: str, key: str, kind: str, priority: int
    ) -> tuple[Completion, str, str]:
        """The completion, its request id and the address that gave it: the first that does not break down."""
        order = self._addresses.order(key)
        for address in order:
            try:
                return *await self._post(address, body, request_id, kind, priority), address.url
            except AttemptFailed as error:
                if error.reason not in BROKEN:
                    self._addresses.worked(address)  # it is there, whatever it thinks of this request
                    raise
                if error.reason != LEFT_OUT:
                    self._addresses.failed(address)
                if address is order[-1]:
                    raise
                self.counters.moved += 1
        raise AssertionError("an endpoint has an address")

    async def _post(
        self, address: Address, body: bytes, request_id: str, kind: str, priority: int
    ) -> tuple[Completion, str]:
        """One request at one address, once there is a place for it."""
        asked = time.monotonic()
        try:
            turn = await address.limit.begin(priority)
        except Dismissed:
            raise AttemptFailed(LEFT_OUT) from None
        start = time.monotonic()
        self.counters.waited_seconds += start - asked
        seconds, refused = None, False
        self.counters.requests += 1
        try:
            completion, request_id = await self._transport.post(address.url, body, request_id)
            seconds = time.monotonic() - start
        except AttemptFailed as error:
            refused = error.reason in TOO_MUCH
            raise
        finally:
            address.limit.end(turn, kind, seconds, refused=refused)
        self._addresses.worked(address)
        if (usage := completion.usage) is not None:
            self.counters.prompt_tokens += usage.prompt_tokens
            self.counters.cached_tokens += usage.cached_tokens
            self.counters.completion_tokens += usage.completion_tokens
        return completion, request_id


def _cache_key(url: str, content: str) -> str:
    """Of a reply: who gave it, and to what; `content` is the digest of the whole request in its endpoint's dialect."""
    return hashlib.sha256(f"{url} {content}".encode()).hexdigest()
