"""What the benchmarks share: prompts, work done at the same time, files replaced whole, and what it all cost."""

import asyncio
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from balcap_mega.errors import UserError
from balcap_mega.rewards.mllm.client import ChatClient, ClientCounters
from balcap_mega.rewards.mllm.dialect import remedy_for
from balcap_mega.rewards.mllm.failures import RequestFailed
from balcap_mega.rewards.mllm.judge import JudgeReport
from balcap_mega.rewards.mllm.questions import image_data_url
from balcap_mega.rewards.mllm.replies import usable_text

T = TypeVar("T")
log = logging.getLogger(__name__)


def load_prompts(needs: Mapping[str, Sequence[str]], folder: str | Path | None = None) -> dict[str, str]:
    """Judge prompts by name: ours, or `folder/<name>.txt`, where an original's wording can be put as it stands.

    needs: for each prompt the names that must stand in it in braces; of "reference|caption_ref" one is enough. Raises
    UserError for a prompt that lacks them: the judge would never see what it is asked about.
    """
    if folder is None:
        prompts = files("balcap_mega.evaluation").joinpath("prompts")
        return {name: prompts.joinpath(f"{name}.txt").read_text(encoding="utf-8") for name in needs}
    texts = {}
    for name, wanted in needs.items():
        path = Path(folder) / f"{name}.txt"
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompts: {path} cannot be read", remedy="put the prompt there, or leave --prompts out"
            ) from error
        for names in wanted:
            braced = [f"{{{one}}}" for one in names.split("|")]
            if not any(one in texts[name] for one in braced):
                shown = " or ".join(braced)
                raise UserError(f"--prompts: {path} has no {shown}", remedy=f"write {shown} where it belongs")
    return texts


def fill(template: str, **values: str) -> str:
    """Put `values` at their {names}; braces anywhere else, also within the values, stay as they are.

    A template whose other braces are all doubled, as `str.format` wants them, is filled as `str.format` does.
    """
    try:
        names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError:
        names = {""}
    if names <= values.keys():
        return template.format(**values)
    return re.sub(r"\{(\w+)\}", lambda name: values.get(name[1], name[0]), template)


async def check(client: ChatClient, picture: bool = False, tokens: int = 2000) -> None:
    """Raise UserError unless the endpoint answers a small question, with a `picture` and within so many `tokens`."""
    content: Any = "Reply with the letter A."
    if picture:
        url = image_data_url(Image.new("RGB", (64, 64), "red"))
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": content}]
    question = {"messages": [{"role": "user", "content": content}], "max_completion_tokens": tokens}
    try:
        await client.ask(question, lambda completion: usable_text(completion.choices[0], cut_is_fine=True))
    except RequestFailed as error:
        shown = ", with a picture" if picture else ""
        said = f", which says: {error.said}" if error.said else ""
        remedy = remedy_for(error.said) or "check that the endpoint runs, serves that model, and takes the key"
        if error.reasons[-1] in ("empty", "truncated"):
            remedy = "a judge that thinks first needs more tokens: set rewards.endpoint.dialect.thinking_tokens=4096"
        raise UserError(
            f"the judge {client.endpoint.model!r} does not answer a small question{shown}: {error}{said}", remedy=remedy
        ) from error


@dataclass(frozen=True)
class Coverage:
    """How much of what a run was about has a judgement. missing: what has none, by reason."""

    total: int
    missing: dict[str, int]

    @property
    def judged(self) -> int:
        return self.total - sum(self.missing.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.missing.items()))
        return f"{self.judged} of {self.total} judged" + (f"; not judged: {reasons}" if reasons else "")


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int) -> Counter[str]:
    """Run `work(item)` for every item, `at_once` at a time; count those that got no usable reply, by reason.

    Those are logged and left for the next run. Any other error ends the run.
    """
    remaining = iter(list(items))
    failed: Counter[str] = Counter()

    async def worker() -> None:
        for item in remaining:
            try:
                await work(item)
            except RequestFailed as error:
                failed[error.reasons[-1]] += 1
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
