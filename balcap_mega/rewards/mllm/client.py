"""A chat client for OpenAI-compatible endpoints: bounded concurrency, retries, and a name for every failure."""

import asyncio
import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from pydantic import ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from balcap_mega.config.schema import JudgeEndpoint
from balcap_mega.errors import UserError
from balcap_mega.rewards.mllm.cache import ReplyCache
from balcap_mega.rewards.mllm.failures import AttemptFailed, RequestFailed, Unusable
from balcap_mega.rewards.mllm.replies import Completion

T = TypeVar("T")
log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 60.0
MOST_REPLY_BYTES = 2**23  # a hundred times what any question here is answered with, unpacked
REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)  # of the server's own, what goes into logs
# Greedy decoding would repeat an unusable reply; the next attempts sample, each with its own fixed seed.
SECOND_OPINION_TEMPERATURE = 0.3


@dataclass
class ClientCounters:
    """What a client has spent and met so far. `failures` counts requests given up, by their last reason."""

    requests: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)


class ChatClient:
    """Asks one endpoint. Create it anywhere, use it on one event loop, and `await close()` it there.

    backoff_seconds: mean of the first back-off; it doubles with each attempt, with full jitter, up to a minute.
    Certificates of https endpoints are verified; a key that would go over plain http to another host is warned about.
    Raises UserError for a key variable that is not set.
    """

    def __init__(self, endpoint: JudgeEndpoint, cache: ReplyCache | None = None, backoff_seconds: float = 0.5):
        self._headers = {"Content-Type": "application/json"}
        self._key = ""
        if endpoint.api_key_env is not None:
            if not os.environ.get(endpoint.api_key_env):
                raise UserError(
                    f"endpoint.api_key_env names {endpoint.api_key_env}, which is not set",
                    remedy=f"export {endpoint.api_key_env}=... before starting",
                )
            self._key = os.environ[endpoint.api_key_env]
            if not (self._key.isascii() and self._key.isprintable()):
                raise UserError(
                    f"the key in {endpoint.api_key_env} holds characters that no key has",
                    remedy="export it anew, without line breaks",
                )
            self._headers["Authorization"] = f"Bearer {self._key}"
            address = urlsplit(endpoint.base_url)
            if address.scheme == "http" and not _is_loopback(address.hostname):
                log.warning("the key in %s goes to %s unencrypted; use https", endpoint.api_key_env, address.hostname)
        self.endpoint = endpoint
        self.counters = ClientCounters()
        self._url = endpoint.base_url.rstrip("/") + "/chat/completions"
        self._cache = cache
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._backoff = wait_random_exponential(multiplier=2 * backoff_seconds, max=LONGEST_WAIT_SECONDS)
        self._session: aiohttp.ClientSession | None = None  # belongs to the event loop that first asks

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, body: dict[str, Any], accept: Callable[[Completion], T], *, use_cache: bool = True) -> T:
        """POST `body` (the model's name is added) and return `accept(completion)`.

        `accept` raises `Unusable` to have the request tried again. Raises RequestFailed after the last attempt, or at
        once where trying again cannot help (a key or a model that the endpoint does not know).
        """
        body = {"model": self.endpoint.model, **body}
        encoded = json.dumps(body).encode()
        digest = hashlib.sha256(encoded).hexdigest()
        cache = self._cache if use_cache else None
        if cache is not None and (kept := cache.get(digest)) is not None:
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
                        encoded = json.dumps(body).encode()
                    request_id = f"{digest[:16]}-{number}"
                    try:
                        completion, request_id = await self._post(encoded, request_id)
                        accepted = accept(completion)
                    except AttemptFailed as error:
                        error.request_id = error.request_id or request_id
                        failed.append(error)
                        raise
            if cache is not None:
                cache.put(digest, completion.model_dump_json())
            return accepted
        except AttemptFailed as error:
            self.counters.failures[error.reason] += 1
            raise RequestFailed([e.reason for e in failed], [e.request_id for e in failed]) from error

    def _wait(self, state: RetryCallState) -> float:
        hint = state.outcome.exception().retry_after
        return max(self._backoff(state), min(hint, LONGEST_WAIT_SECONDS))

    async def _post(self, body: bytes, request_id: str) -> tuple[Completion, str]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self.endpoint.concurrency),
                timeout=aiohttp.ClientTimeout(total=self.endpoint.timeout_seconds),
                headers=self._headers,
                trust_env=True,
            )
        try:
            async with self._slots:
                self.counters.requests += 1
                async with self._session.post(
                    self._url, data=body, headers={"X-Request-Id": request_id}, allow_redirects=False
                ) as response:
                    content = await _read(response.content)
        except TimeoutError:
            raise AttemptFailed("timeout") from None
        except aiohttp.ClientSSLError:
            raise AttemptFailed("tls", retry=False) from None
        except aiohttp.ClientError:
            raise AttemptFailed("connection") from None
        given = response.headers.get("x-request-id", "")
        if REQUEST_ID.fullmatch(given) and not (self._key and self._key in given):  # some echo what they were sent
            request_id = given
        status = response.status
        if status != 200:
            raise AttemptFailed(
                f"http_{status}",
                retry=status in (408, 409, 425, 429) or status >= 500,
                request_id=request_id,
                retry_after=_seconds(response.headers.get("retry-after")),
            )
        if content is None:
            raise AttemptFailed("too_long", request_id=request_id)
        try:
            completion = Completion.model_validate_json(content)
        except ValidationError:
            raise AttemptFailed("invalid_response", request_id=request_id) from None
        if completion.usage is not None:
            self.counters.prompt_tokens += completion.usage.prompt_tokens
            self.counters.completion_tokens += completion.usage.completion_tokens
        return completion, request_id


async def _read(stream: aiohttp.StreamReader) -> bytes | None:
    """The whole body, unpacked; None for more than MOST_REPLY_BYTES, which are never held."""
    content = bytearray()
    async for chunk in stream.iter_any():
        content += chunk
        if len(content) > MOST_REPLY_BYTES:
            return None
    return bytes(content)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _seconds(header: str | None) -> float:
    """Retry-After as seconds; its other form, a date, and what is no number are read as no hint."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0
