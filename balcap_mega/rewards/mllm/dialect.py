"""How a request is put to one endpoint: the same question in the words that its server takes."""

import re
from typing import Any

from balcap_mega.config.schema import DialectConfig

LIMIT = "max_completion_tokens"  # what questions call it; `DialectConfig.token_limit` is what is sent


def as_sent(body: dict[str, Any], model: str, dialect: DialectConfig) -> dict[str, Any]:
    """`body`, written as OpenAI documents chat completions, as this endpoint takes it."""
    sent = {"model": model, **body}
    if (limit := sent.pop(LIMIT, None)) is not None:
        sent[dialect.token_limit] = limit + dialect.thinking_tokens
    refused = [] if dialect.temperature else ["temperature", "top_p"]
    refused += [] if dialect.seed else ["seed"]
    for name in refused:
        sent.pop(name, None)
    if "response_format" in sent:
        if dialect.replies == "none":
            del sent["response_format"]
        elif dialect.replies == "json_object":
            sent["response_format"] = {"type": "json_object"}
        elif not dialect.patterns:
            sent["response_format"] = _without_patterns(sent["response_format"])
    return {**sent, **dialect.extra_body}


def _without_patterns(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_patterns(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_patterns(part) for name, part in value.items() if name != "pattern"}


REMEDIES = (
    (r"temperature|top_p", "{key}.dialect.temperature=false"),
    (r"\bseed\b", "{key}.dialect.seed=false"),
    (r"pattern", "{key}.dialect.patterns=false"),
    (r"response_format|json_schema|structured", "{key}.dialect.replies=json_object, or none"),
    (r"image|vision|multi-?modal", "a model that takes images, by its own endpoint: rewards.question_endpoints.verify"),
    (r"context|maximum.{0,20}length|too long", "a longer context of the server, or a smaller image (data.max_pixels)"),
)


def remedy_for(said: str, key: str = "rewards.endpoint") -> str:
    """The setting that a server's refusal asks for, as `key` calls it; empty where the words name none."""
    if limit := re.search(r"max_(completion_)?tokens", said):  # the first one named is the one that was refused
        return f"set {key}.dialect.token_limit={'max_tokens' if limit[1] else LIMIT}"
    found = [setting for words, setting in REMEDIES if re.search(words, said, re.IGNORECASE)]
    return f"set {found[0].format(key=key)}" if found else ""
