"""The addresses of one endpoint: which one a request goes to, and which ones are left out until they answer again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from balcap_mega.rewards.mllm.pressure import AdaptiveLimit

log = logging.getLogger(__name__)

FAILURES_TO_LEAVE = 3  # in a row, before an address is left out
FIRST_PROBE_SECONDS, LONGEST_PROBE_SECONDS = 1.0, 30.0


@dataclass(eq=False)
class Address:
    """One server of an endpoint. `failed` counts its failures in a row; at FAILURES_TO_LEAVE it is left out."""

    url: str
    limit: AdaptiveLimit
    failed: int = 0
    probing: asyncio.Task | None = field(default=None, repr=False)

    @property
    def sound(self) -> bool:
        return self.failed < FAILURES_TO_LEAVE


class Addresses:
    """All addresses of an endpoint, used on one event loop.

    ceiling: requests at once to each
    probe:   whether an address answers again; asked ever more rarely while it does not
    """

    def __init__(self, urls: Sequence[str], ceiling: int, probe: Callable[[str], Awaitable[bool]]):
        self.all = tuple(Address(url.rstrip("/"), AdaptiveLimit(ceiling)) for url in urls)
        self._probe = probe

    def order(self, key: str) -> list[Address]:
        """Where a request of that key goes first, next, and so on: by rendezvous hashing, those left out at the end.

        The same key always finds the same address while that is sound, and when one is left out only its own keys move.
        """
        ranked = sorted(self.all, key=lambda address: sha256(f"{address.url} {key}".encode()).digest())
        return sorted(ranked, key=lambda address: not address.sound)

    def worked(self, address: Address) -> None:
        address.failed = 0

    def failed(self, address: Address) -> None:
        """The address could not be reached or broke down. The only address is never left out."""
        address.failed += 1
        if len(self.all) > 1 and not address.sound and address.probing is None:
            log.warning("the judge at %s does not answer; its requests go to other addresses", address.url)
            address.limit.dismiss()
            address.probing = asyncio.ensure_future(self._until_it_answers(address))

    async def _until_it_answers(self, address: Address) -> None:
        pause = FIRST_PROBE_SECONDS
        while not address.sound:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PROBE_SECONDS)
            if await self._probe(address.url):
                address.failed = 0
        address.probing = None
        log.warning("the judge at %s answers again", address.url)

    async def close(self) -> None:
        probes = [address.probing for address in self.all if address.probing is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
