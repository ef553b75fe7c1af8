"""Why a request came to nothing: a short name fit for counting and, for a person, what the server itself said."""

import json
import re
from contextlib import suppress
from urllib.parse import quote

MOST_CHARACTERS = 300
SECRET_LIKE = re.compile(r"\b(?:bearer\s+\S+|(?:sk|pk|key|hf|api[_-]?key)[-_=:][\w.=*-]{6,})", re.IGNORECASE)
SHORTEST_PART = 6  # of a key, that could be told from a word


class AttemptFailed(Exception):
    """One attempt came to nothing. `reason` is a short name fit for counting.

    said: the server's own words as `explanation` leaves them; shown by checks, never logged in a run
    """

    def __init__(
        self, reason: str, *, retry: bool = True, request_id: str = "", retry_after: float = 0.0, said: str = ""
    ):
        super().__init__(reason)
        self.reason = reason
        self.retry = retry
        self.request_id = request_id
        self.retry_after = retry_after
        self.said = said


class Unusable(AttemptFailed):
    """The endpoint answered, but not what was asked: a refusal, a cut or invalid reply, a score out of range."""


class RequestFailed(Exception):
    """A request that every attempt failed; the ids let the endpoint's operator find each one."""

    def __init__(self, reasons: list[str], request_ids: list[str], said: str = ""):
        super().__init__(f"{', '.join(reasons)} (request ids {', '.join(request_ids)})")
        self.reasons = reasons
        self.request_ids = request_ids
        self.said = said


def explanation(body: bytes, key: str = "") -> str:
    """What an error's body says: one shortened line of printable characters, without `key` or what looks like a key.

    Reads the message of OpenAI's form ({"error": {"message"}}), of FastAPI's ({"detail"}), or the text as it stands.
    """
    text = body[: 2**16].decode("utf-8", "replace")
    with suppress(ValueError, RecursionError):
        text = _message(json.loads(text)) or text
    for secret in filter(None, (key, quote(key, safe=""), json.dumps(key)[1:-1])):
        text = re.sub(re.escape(secret), "…", text, flags=re.IGNORECASE)
    if key:  # some show a part of it
        text = " ".join("…" if len(word) >= SHORTEST_PART and word in key else word for word in text.split())
    text = SECRET_LIKE.sub("…", " ".join(text.split()))
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def _message(value: object) -> str:
    for name in ("error", "message", "detail", "msg"):
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, dict) and name in value:
            value = value[name]
    return value if isinstance(value, str) else ""
