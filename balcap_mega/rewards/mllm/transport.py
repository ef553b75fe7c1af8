"""HTTP to a judge: one request and its reply, bounded, verified, and with no other credentials than configured."""

import logging
import math
import os
import re
from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from pydantic import ValidationError

from balcap_mega.config.schema import JudgeEndpoint
from balcap_mega.errors import UserError
from balcap_mega.rewards.mllm.failures import AttemptFailed, explanation
from balcap_mega.rewards.mllm.replies import Completion

log = logging.getLogger(__name__)

MOST_REPLY_BYTES = 2**23  # a hundred times what any question here is answered with, unpacked
REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)  # of the server's own, what goes into logs
PROBE_SECONDS = 5.0


class Transport:
    """Connections to the addresses of one endpoint, on one event loop.

    Certificates of https endpoints are verified; a key that would go over plain http to another host is warned about.
    Proxies are those of the environment. Credentials are `api_key_env`'s alone: ~/.netrc is not read.
    Raises UserError for a key variable that is not set.
    """

    def __init__(self, endpoint: JudgeEndpoint):
        self._headers = {"Content-Type": "application/json"}
        self._key = ""
        if endpoint.api_key_env is not None:
            self._key = _read_key(endpoint.api_key_env, endpoint)
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._timeout_seconds = endpoint.timeout_seconds
        self._session: aiohttp.ClientSession | None = None  # belongs to the event loop that first asks

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, url: str, body: bytes, request_id: str) -> tuple[Completion, str]:
        """The completion, and the id that this server or else we gave the request. Raises AttemptFailed."""
        try:
            async with self._open().post(
                f"{url}/chat/completions",
                data=body,
                headers={"X-Request-Id": request_id},
                allow_redirects=False,
                proxy=_proxy_for(url),
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
                said=explanation(content or b"", self._key),
            )
        if content is None:
            raise AttemptFailed("too_long", request_id=request_id)
        try:
            completion = Completion.model_validate_json(content)
        except ValidationError:
            raise AttemptFailed("invalid_response", request_id=request_id) from None
        return completion, request_id

    async def answers(self, url: str) -> bool:
        """Whether something that speaks HTTP, and is not broken, stands at that address."""
        try:
            async with self._open().get(
                f"{url}/models",
                allow_redirects=False,
                proxy=_proxy_for(url),
                timeout=aiohttp.ClientTimeout(total=PROBE_SECONDS),
            ) as response:
                return response.status < 500
        except (TimeoutError, aiohttp.ClientError):
            return False

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # `AdaptiveLimit` bounds them
                timeout=aiohttp.ClientTimeout(total=self._timeout_seconds),
                headers=self._headers,
            )
        return self._session


def _read_key(name: str, endpoint: JudgeEndpoint) -> str:
    key = os.environ.get(name, "")
    if not key:
        raise UserError(
            f"endpoint.api_key_env names {name}, which is not set", remedy=f"export {name}=... before starting"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"the key in {name} holds characters that no key has", remedy="export it anew, without line breaks"
        )
    for address in map(urlsplit, endpoint.addresses):
        if address.scheme == "http" and not _is_loopback(address.hostname):
            log.warning("the key in %s goes to %s unencrypted; use https", name, address.hostname)
    return key


def _proxy_for(url: str) -> str | None:
    """The environment's proxy for that address, if any. aiohttp would find it too, and read ~/.netrc as well."""
    address = urlsplit(url)
    proxy = None if proxy_bypass(address.netloc) else getproxies().get(address.scheme)
    return proxy if proxy is not None and proxy.startswith("http://") else None  # aiohttp speaks to no others


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
