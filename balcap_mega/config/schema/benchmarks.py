"""Benchmarks that are taken while a run trains."""

from typing import Annotated

from pydantic import Field

from balcap_mega.config.schema.base import Positive, Section
from balcap_mega.config.schema.endpoint import JudgeEndpoint


class CaptionQaFiles(Section):
    """CaptionQA's questions (JSON, JSON Lines or Parquet), and a folder of pictures named by their id."""

    questions: str
    """JSON, JSON Lines or Parquet."""
    images: str
    """Folder of pictures named by their id."""
    max_tokens: Positive = 4
    """Of an answer; a judge that thinks first takes its endpoint's dialect.thinking_tokens."""


class DcScoreFiles(Section):
    """DeCapBench's annotations (JSON Lines, with `oracle_caption`), and the folder of its pictures."""

    annotations: str
    """JSON Lines, with `oracle_caption`."""
    images: str
    """Folder of the pictures."""


class BenchmarkConfig(Section):
    """Benchmarks of the policy every `eval_every` steps, judged beside the training, which they never end or delay."""

    captionqa: CaptionQaFiles | None = None
    """CaptionQA's files; null: not measured."""
    dcscore: DcScoreFiles | None = None
    """DCScore's files; null: not measured."""
    endpoint: JudgeEndpoint | None = None
    """The judge; null: that of `rewards`. One of its own takes no part of the rewards' rate."""
    prompt: str = "Describe this image in detail."
    """What the policy is asked for."""
    wait_seconds: Annotated[int, Field(ge=0, le=480)] = 300
    """Longest wait, after the last step, for what is still judged."""

    @property
    def wanted(self) -> bool:
        return self.captionqa is not None or self.dcscore is not None
