"""What a real judge's server costs: tokens read at one rate and written at another, a batch, and a prefix cache.

Tokens are counted by Tekken, the tokenizer of Mistral-Nemo, Pixtral and Mistral-Small 3, whose vocabulary comes with
mistral_common. An image counts as IMAGE_TOKENS, whatever it shows.
"""

import asyncio
import json
import time
from collections import deque
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

TOKENIZER = "Tekken (mistral_common, tekken_240911)"
IMAGE_TOKENS = 1280  # a square megapixel picture at 28 x 28 pixels a token
BLOCK = 16  # tokens that a prefix cache keeps or forgets together, vLLM's default
TURN_TOKENS = 5  # a chat template's, around each message
TICK_SECONDS = 0.01


@cache
def _tekken():
    import mistral_common
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    return Tekkenizer.from_file(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json")


def token_ids(text: str) -> list[int]:
    return _tekken().encode(text, bos=False, eos=False)


def prompt_tokens(body: dict) -> list[int]:
    """A chat request as token ids; those of an image are made from its content, so that equal images are equal."""
    ids: list[int] = []
    for message in body["messages"]:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                ids += token_ids(part["text"])
            else:
                ids += [int.from_bytes(sha256(part["image_url"]["url"].encode()).digest()[:8])] * IMAGE_TOKENS
        ids += [-1] * TURN_TOKENS
    return ids


class PrefixCache:
    """Blocks of prompts, each known by everything up to its end; the least recently used are forgotten."""

    def __init__(self, tokens: int):
        self._most, self._blocks = tokens // BLOCK, {}

    def read(self, ids: list[int]) -> int:
        """How many of a prompt's tokens are there already; afterwards all of them are."""
        found, known, digest = 0, True, b""
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            digest = sha256(digest + json.dumps(ids[start : start + BLOCK]).encode()).digest()
            known = known and digest in self._blocks
            found += BLOCK if known else 0
            self._blocks.pop(digest, None)
            self._blocks[digest] = True
        while len(self._blocks) > self._most:
            del self._blocks[next(iter(self._blocks))]
        return min(found, len(ids) - 1)  # the last one is computed in any case


@dataclass(frozen=True)
class Rates:
    """Of one server: tokens a second that it reads and writes at most, seconds a token that one reply takes at least,
    replies at once, and tokens that its prefix cache keeps."""

    prefill: float = 20_000
    decode: float = 6_000
    token_seconds: float = 0.02
    batch: int = 256
    cache: int = 500_000


@dataclass(eq=False)
class _Sequence:
    to_read: float
    to_write: float
    done: asyncio.Future


class RatedEngine:
    """Shares a server's time over the requests that it has: prompts are read in turn, replies written together."""

    def __init__(self, rates: Rates):
        self.rates, self._cache = rates, PrefixCache(rates.cache)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._loop: asyncio.Task | None = None

    async def serve(self, body: dict, reply: str) -> dict:
        """Take the time that this exchange costs; return its `usage`."""
        ids, written = prompt_tokens(body), len(token_ids(reply)) + 1
        cached = self._cache.read(ids)
        sequence = _Sequence(len(ids) - cached, written, asyncio.get_running_loop().create_future())
        self._waiting.append(sequence)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.ensure_future(self._run())
        await sequence.done
        details = {"cached_tokens": cached}
        return {"prompt_tokens": len(ids), "completion_tokens": written, "prompt_tokens_details": details}

    async def _run(self) -> None:
        last = time.monotonic()
        while self._waiting or self._running:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            while self._waiting and len(self._running) < self.rates.batch:
                self._running.append(self._waiting.popleft())
            self._work(now - last)
            last = now

    def _work(self, seconds: float) -> None:
        reading = [sequence for sequence in self._running if sequence.to_read > 0]
        writing = [sequence for sequence in self._running if sequence.to_read <= 0]
        left = seconds
        most = seconds * (0.7 if writing else 1.0)  # prompts come in chunks beside the replies
        for sequence in reading:
            spent = min(sequence.to_read / self.rates.prefill, most)
            sequence.to_read -= spent * self.rates.prefill + 1e-9
            most, left = most - spent, left - spent
        if writing:
            tokens = min(left * self.rates.decode / len(writing), seconds / self.rates.token_seconds)
            for sequence in writing:
                sequence.to_write -= tokens
                if sequence.to_write <= 0:
                    self._running.remove(sequence)
                    if not sequence.done.done():
                        sequence.done.set_result(None)
