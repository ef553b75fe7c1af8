"""A server that answers questions: its addresses, limits and dialect."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, JsonValue, field_validator

from balcap_mega.config.schema.base import Positive, Section


class DialectConfig(Section):
    """How an endpoint's server differs from the chat completions that OpenAI documents."""

    token_limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """What the limit of a reply is called."""
    temperature: bool = True
    """Send temperature and top_p; some models take no other than their own."""
    seed: bool = True
    """Send a seed."""
    replies: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How JSON is asked for; none: by the prompt alone."""
    patterns: bool = True
    """Let a JSON schema hold regular expressions."""
    thinking_tokens: Annotated[int, Field(ge=0)] = 0
    """Added to the limit of every reply, for a judge that thinks before it answers."""
    extra_body: dict[str, JsonValue] = {}
    """Sent as it stands, such as {chat_template_kwargs: {enable_thinking: false}}; never a key."""

    @field_validator("extra_body")
    @classmethod
    def beside_the_question(cls, body: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted({"model", "messages", "response_format", "n", "stream"} & set(body)):
            raise ValueError(f"{', '.join(taken)} belong to the question; leave them out of extra_body")
        return body


class JudgeEndpoint(Section):
    """An OpenAI-compatible endpoint. The key is read from the environment variable `api_key_env`, never from here.

    What stands here is shown in logs and reports, so an address with credentials in it is refused.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str | tuple[str, ...]
    """Address such as http://judge:8000/v1, or a list of them: each serves the same model, and an image's requests go
    to one of them."""
    model: str
    """Name that the endpoint serves the model under."""
    api_key_env: str | None = None
    """Environment variable that holds the key."""
    concurrency: Positive = 64
    """Most requests that an address gets at once from the whole job; fewer while it labours."""
    timeout_seconds: Positive = 120
    """Longest wait for one reply."""
    max_retries: Annotated[int, Field(ge=0)] = 4
    """Times that a failed request is sent again."""
    dialect: DialectConfig = DialectConfig()
    """How the server differs from what OpenAI documents."""

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url

    @field_validator("base_url", mode="before")
    @classmethod
    def plain_addresses(cls, base_url: Any) -> Any:
        addresses = base_url if isinstance(base_url, list | tuple) else [base_url]
        if not addresses or len(set(map(str, addresses))) < len(addresses):
            raise ValueError("it names no address, or one twice; give each server once")
        if not all(isinstance(address, str) and _is_plain_address(address) for address in addresses):
            raise ValueError(
                "it is no plain http(s) address; write it as https://host:port/v1, a key never within it but in the "
                "environment variable that api_key_env names"
            )
        return base_url if isinstance(base_url, str) else tuple(base_url)

    @field_validator("api_key_env")
    @classmethod
    def a_variables_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
            raise ValueError("it is no name of an environment variable; give the name, in capitals, not the key itself")
        return name


def _is_plain_address(base_url: str) -> bool:
    try:
        address = urlsplit(base_url)
        plain = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
    except ValueError:
        return False
    return plain and not set(base_url) & set("@?#\\ ,") and base_url.isprintable()
