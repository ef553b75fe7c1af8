"""How many captions a second a judge gives, on a run's own pictures: what `launch/plan.py` plans with."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.rewards.mllm.judge import MllmJudge


@dataclass(frozen=True)
class JudgeRate:
    """One measurement. `written`, `read` and `cached` are the judge's tokens a caption.

    model, addresses: whom the pictures went to
    complete:         captions whose every question was answered, of `captions`
    failures:         requests given up, by reason
    """

    model: str
    addresses: int
    captions: int
    complete: int
    captions_per_second: float
    written: float
    read: float
    cached: float
    failures: dict[str, int]


def measure(judge: MllmJudge, records: Sequence[CaptionRecord], group: int, timeout_seconds: float) -> JudgeRate:
    """Judge `group` captions of each record, all submitted at once: its reference, begun at another sentence each.

    Raises TimeoutError where one takes longer than `timeout_seconds`.
    """
    before, start = judge.report(), time.monotonic()
    futures = [judge.submit(record, turned(record.reference, turn)) for record in records for turn in range(group)]
    judgements = [future.result(timeout=timeout_seconds) for future in futures]
    seconds, after = time.monotonic() - start, judge.report()
    endpoint = judge.config.endpoints().get("verify", judge.config.endpoint)
    count = max(len(futures), 1)
    return JudgeRate(
        model=endpoint.model,
        addresses=len(endpoint.addresses),
        captions=len(futures),
        complete=sum(None not in map(each.part, judge.config.judged) for each in judgements),
        captions_per_second=len(futures) / max(seconds, 1e-9),
        written=(after.completion_tokens - before.completion_tokens) / count,
        read=(after.prompt_tokens - before.prompt_tokens) / count,
        cached=(after.cached_tokens - before.cached_tokens) / count,
        failures=dict(after.failures - before.failures),
    )


def turned(text: str, turn: int) -> str:
    """The text's sentences, begun with another one: as long and as rich, and not the same to a prefix cache."""
    sentences = text.split(". ")
    turn %= len(sentences)
    return ". ".join(sentence.strip(" .") for sentence in sentences[turn:] + sentences[:turn]) + "."


def write_rate(path: Path, rate: JudgeRate) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(rate), indent=2) + "\n", encoding="utf-8")


def read_rate(path: Path) -> JudgeRate:
    """Raises UserError for a file that `write_rate` did not write."""
    try:
        return TypeAdapter(JudgeRate).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", remedy="give a file of benchmarks/judge.py") from None
    except ValidationError as error:
        raise UserError(
            f"{path} holds no measured judge ({error.errors()[0]['msg']})",
            remedy="write it with benchmarks/judge.py --endpoint URL --config FILE --json FILE",
        ) from None
