"""What the benchmarks share: prompts, work done at the same time, files replaced whole, and what it all cost."""

import asyncio
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from balcap_mega.data.files import read_image_file
from balcap_mega.data.images import PilDecoder
from balcap_mega.errors import UserError
from balcap_mega.rewards.mllm.client import ChatClient, ClientCounters
from balcap_mega.rewards.mllm.failures import RequestFailed
from balcap_mega.rewards.mllm.judge import JudgeReport

T = TypeVar("T")
log = logging.getLogger(__name__)


def load_prompt(name: str, folder: str | Path | None = None) -> str:
    """A judge prompt: ours, or `folder/name.txt`, where a benchmark's original wording can be put."""
    if folder is None:
        return files("balcap_mega.evaluation").joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8")
    path = Path(folder) / f"{name}.txt"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--prompts: {path} cannot be read", remedy="put the prompt there, or leave --prompts out"
        ) from error


def fill(template: str, **values: str) -> str:
    """Put `values` at their {names}; braces anywhere else, also within the values, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda name: values.get(name[1], name[0]), template)


async def check(client: ChatClient) -> None:
    """Raise UserError unless the endpoint answers a small question."""
    question = {"messages": [{"role": "user", "content": "Reply with the letter A."}], "max_completion_tokens": 4}
    try:
        await client.ask(question, lambda completion: completion)
    except RequestFailed as error:
        raise UserError(
            f"the judge {client.endpoint.model!r} does not answer: {error}",
            remedy="check that the endpoint runs, serves that model, and takes the key",
        ) from error


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int) -> int:
    """Run `work(item)` for every item, `at_once` at a time; return how many failed for lack of a judge's reply.

    Those are logged and left for the next run. Any other error ends the run.
    """
    remaining = iter(list(items))
    failed = 0

    async def worker() -> None:
        nonlocal failed
        for item in remaining:
            try:
                await work(item)
            except RequestFailed as error:
                failed += 1
                log.warning("no reply: %s", error)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())
    except ExceptionGroup as errors:
        if isinstance(errors.exceptions[0], UserError):
            raise errors.exceptions[0] from None
        raise
    return failed


def read_json(path: str | Path, what: str, form: Any) -> Any:
    """The file's content, of the type `form`. Raises UserError naming what is not of it."""
    return _parse(TypeAdapter(form), _read(path, what), str(path), what)


def read_json_lines(path: str | Path, what: str, form: Any) -> list[Any]:
    """The same for a file of one JSON value a line."""
    adapter = TypeAdapter(form)
    lines = enumerate(_read(path, what).splitlines(), start=1)
    return [_parse(adapter, line, f"{path}:{number}", what) for number, line in lines if line.strip()]


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not a readable file ({error})", remedy=f"name the file with {what}") from error


def _parse(adapter: TypeAdapter, text: bytes, where: str, what: str) -> Any:
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in first["loc"])
        raise UserError(f"{where}: {key}{first['msg']}", remedy=f"name the JSON file with {what}") from error


def read_picture(path: Path) -> Image.Image:
    """An image file as training would read it. Raises UserError for one that cannot be decoded."""
    (picture,) = PilDecoder()([read_image_file(path)])
    if picture is None:
        raise UserError(f"{path} cannot be decoded", remedy="replace the image")
    return picture


def write_json(path: str | Path, value: Any) -> None:
    _replace(Path(path), json.dumps(value, ensure_ascii=False, indent=2))


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> None:
    _replace(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    """Replace the file at once, so that an interruption leaves the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@dataclass(frozen=True)
class Spending:
    """Requests and tokens, and their price in US dollars where the prices a million tokens are given."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float | None = None

    @classmethod
    def of(
        cls, counters: ClientCounters | JudgeReport, prompt_price: float | None, completion_price: float | None
    ) -> "Spending":
        dollars = None
        if prompt_price is not None and completion_price is not None:
            spent = counters.prompt_tokens * prompt_price + counters.completion_tokens * completion_price
            dollars = spent / 1e6
        return cls(counters.requests, counters.prompt_tokens, counters.completion_tokens, dollars)

    def __add__(self, other: "Spending") -> "Spending":
        prices = [value for value in (self.dollars, other.dollars) if value is not None]
        return Spending(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            sum(prices) if prices else None,
        )


def add_to_ledger(path: str | Path, spent: Spending) -> Spending:
    """Add one run's spending to the ledger kept beside the results; return the sum over all runs."""
    path = Path(path)
    before = read_json(path, "what earlier runs have spent", Spending) if path.exists() else Spending()
    total = before + spent
    write_json(path, asdict(total))
    return total
