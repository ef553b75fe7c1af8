"""What a step asked of its judge: requests, tokens, waiting and failures, summed over the ranks that ask."""

from collections import Counter
from dataclasses import fields

import torch.distributed

from balcap_mega.rewards.judge import Judge
from balcap_mega.rewards.mllm.judge import JudgeReport, MllmJudge

COUNTS = ("requests", "cache_hits", "prompt_tokens", "cached_tokens", "completion_tokens", "waited_seconds", "moved")


class JudgeMeter:
    """The counts of a multimodal LLM's judge since it was last read; of a judge that asks nobody there are none.

    judge: None on ranks that have no say, as in `Judging`
    """

    def __init__(self, judge: Judge | None):
        self._judge = judge if isinstance(judge, MllmJudge) else None
        self._last = JudgeReport()

    def read(self) -> JudgeReport | None:
        """What all ranks together have asked since the last call; None where no LLM judges. A collective."""
        mine = None
        if self._judge is not None:
            now = self._judge.report()
            mine, self._last = difference(now, self._last), now
        shares = [mine]
        if torch.distributed.is_initialized():
            shares = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, mine)
        reports = [share for share in shares if share is not None]
        return total(reports) if reports else None


def difference(now: JudgeReport, before: JudgeReport) -> JudgeReport:
    """What was added; `limit` is that of now."""
    changed = {each.name: getattr(now, each.name) - getattr(before, each.name) for each in fields(JudgeReport)}
    return JudgeReport(**changed | {"limit": now.limit})


def total(reports: list[JudgeReport]) -> JudgeReport:
    summed = {each.name: getattr(reports[0], each.name) for each in fields(JudgeReport)}
    for report in reports[1:]:
        summed = {name: value + getattr(report, name) for name, value in summed.items()}
    return JudgeReport(**summed)


def judge_metrics(report: JudgeReport | None) -> dict[str, float]:
    """By name, as metrics.jsonl shows them; tokens and seconds are of the whole step, over all its requests.

    judge/concurrency is how many requests may be under way, over all addresses and ranks, at the end of the step.
    """
    if report is None:
        return {}
    metrics: dict[str, float] = {f"judge/{name}": getattr(report, name) for name in COUNTS}
    metrics["judge/concurrency"] = report.limit
    for name, counter in (("retries", report.retries), ("failures", report.failures), ("missing", report.missing)):
        metrics[f"judge/{name}"] = counter.total()
        metrics |= {f"judge/{name}/{reason}": count for reason, count in sorted(counter.items()) if count}
    return metrics


def reasons(report: JudgeReport | None) -> Counter[str] | None:
    """Why requests were given up; None where nobody counts."""
    return None if report is None else report.failures
