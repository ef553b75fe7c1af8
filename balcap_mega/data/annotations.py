"""What readers of annotation files share: rows left out, each with its reason, and texts as files hold them."""

import codecs
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balcap_mega.errors import UserError

_BYTE_ORDER_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that cannot be used: where it stands and why. It counts against `data.max_missing_fraction`."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where} {self.reason}"


def read_text_file(path: str | Path, remedy: str) -> bytes:
    """The file in UTF-8 without a byte order mark, which Windows programs write. Raises UserError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"data.path={path}: not a readable file ({error})", remedy=remedy) from error
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            text = data[len(mark) :]
            return text if encoding == "utf-8" else text.decode(encoding, "surrogatepass").encode("utf-8", "replace")
    return data


def broken_text(value: Any) -> str | None:
    """Why a JSON value is no text that can be encoded, if one of its strings is not."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half a character (U+{ord(error.object[error.start]):04X})"
    return None


def loosely_parsed(data: bytes) -> Any:
    """JSON whose strings may hold halves of characters and bytes that are no UTF-8. Raises ValueError for other."""
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
