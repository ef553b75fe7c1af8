"""What a run reads besides its configuration, as digests: they tell two hosts, or two starts of one run, apart."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from balcap_mega.config.schema import RunConfig
from balcap_mega.data.records import CaptionDataset
from balcap_mega.errors import UserError


@dataclass(frozen=True)
class RowsDigest:
    """How many rows, and a digest of all that they hold, in order, but pictures: ids, paths, texts, questions."""

    count: int
    digest: str


@dataclass(frozen=True)
class RunInputs:
    """rows, held_out: those to train on and those held out, without the rows whose image is not there

    checkpoint: a digest of `model.path` (see `models.huggingface.fingerprint`); None for `model.tiny`
    """

    rows: RowsDigest
    held_out: RowsDigest
    checkpoint: str | None = None

    @classmethod
    def of(cls, train: CaptionDataset, held_out: CaptionDataset, checkpoint: str | None = None) -> "RunInputs":
        return cls(RowsDigest(len(train), train.digest()), RowsDigest(len(held_out), held_out.digest()), checkpoint)

    def differences(self, other: "RunInputs") -> dict[str, str]:
        """For each field in which `other` differs, what is different, in words."""
        told = {}
        for name, what in (("rows", "rows to train on"), ("held_out", "held-out rows")):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours.count != theirs.count:
                told[name] = f"{ours.count} {what} and {theirs.count}"
            elif ours != theirs:
                told[name] = f"{ours.count} {what} and as many others"
        if self.checkpoint != other.checkpoint:
            told["checkpoint"] = "checkpoints of other content at model.path"
        return told


def missing_on_one(*hosts: tuple[str, tuple[str, ...]]) -> str:
    """`, image 'a.jpg' is missing on node7`, of the first image that only one of two lacks; nothing without one."""
    (first, ours), (second, theirs) = ((name, set(lacks)) for name, lacks in hosts)
    for name, only in ((first, ours - theirs), (second, theirs - ours)):
        if only:
            more = f" and {len(only) - 1} more" if len(only) > 1 else ""
            return f"; image {min(only)!r}{more} is missing on {name} alone"
    return ""


def refuse_too_few(config: RunConfig, records: int) -> None:
    """Raise UserError unless a step's prompts can all be different records."""
    if records < config.rollout.prompts_per_step:
        raise UserError(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step} exceeds the {records} records to train on",
            remedy="lower rollout.prompts_per_step, or give more records",
        )


def refuse_unasked(config: RunConfig, dataset: CaptionDataset) -> None:
    """Raise UserError where utility would be missing for more records than it may be, since they have no questions."""
    unasked = getattr(dataset, "unasked", 0)
    if "utility" in config.rewards.judged and unasked > config.rewards.max_missing_fraction * len(dataset):
        raise UserError(
            f"{unasked} of {len(dataset)} records of data.path={config.data.path} have no questions, without which the "
            f"reward utility is missing; rewards.max_missing_fraction is {config.rewards.max_missing_fraction}",
            remedy="make them with launch/prepare_data.py questions, and set data.source=jsonl and data.path to what "
            "it writes; or leave utility out of rewards.components",
        )


def digest_of(values: Iterable[Any]) -> str:
    """Of plain values (texts, numbers, None, tuples of them), by what Python prints of them."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()[:32]
