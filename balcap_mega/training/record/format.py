"""The record of a step: its captions, what the judge found, and what came of it, as one file.

    rollouts/step_000012.jsonl.gz    gzip of JSON lines: the twelfth step's `Header`, then a `RecordedGroup` an image

Floats are written so that they read back to the same bits; NaN and Infinity stand as such. The same step gives the same
bytes: a run that is killed and goes on writes them again.
"""

import gzip
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from torch import Tensor
from typing_extensions import TypedDict

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.errors import UserError
from balcap_mega.rewards.judge import Judgement
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.judging import JudgedCaption

VERSION = 2
MOST_BYTES = 2**28  # of one line
FILE = re.compile(r"step_(\d{6,})\.jsonl\.gz")

Keep = Literal["all", "extremes"]


@dataclass(frozen=True)
class Header:
    """version: of this format; step: the number of steps done with it, as in metrics.jsonl; groups: how many follow

    Version 1 knew neither `trained_logprob` nor `staleness` nor the units' texts: there they are None.
    """

    version: Literal[1, 2]
    step: int
    keep: Keep
    groups: int


class AnyHeader(TypedDict):
    """What the header of every version has."""

    version: int


@dataclass(frozen=True, kw_only=True)
class RecordedCaption:
    """One caption.

    number:        in its group
    logprobs:      the engine's, of each token, as it sampled them
    trained_logprob: the trainer's, mean over the tokens, under the weights that the step's updates began with: the old
                   policy of the ratio. None for a caption that was not trained on (`algorithm.truncated=mask`), and
                   where the run ended before the step's updates did
    staleness:     the mean over the tokens of |trainer's logprob under the weights that sampled − under those that the
                   updates began with|; 0 where these are the same weights, as always with `rollout.ahead=0`. None where
                   nobody has scored the caption when it was sampled: of one prompt in `off_policy.SHARE` it is known
    components:    rewards by name, as judged; None where missing
    length, reference_length: in the length gate's unit
    gated:         a reward was set to 0 for its length
    advantage:     what the update used
    advantages:    by component, normalised in the group and not weighted yet
    """

    number: int
    text: str
    finished: bool
    components: Mapping[str, float | None]
    judgement: Judgement
    length: float
    reference_length: float
    gated: bool
    advantage: float
    advantages: Mapping[str, float]
    trained_logprob: float | None = None
    staleness: float | None = None
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def rollout(self) -> Rollout:
        return Rollout(self.token_ids, self.logprobs, self.text, self.finished)

    @property
    def length_ratio(self) -> float:
        return self.length / max(self.reference_length, 1.0)

    @property
    def reward(self) -> float:
        """The mean of the components it has; what has none counts as 0."""
        known = [value for value in self.components.values() if value is not None]
        return fmean(known) if known else 0.0

    @property
    def mean_logprob(self) -> float:
        """The engine's, over the tokens."""
        return fmean(self.logprobs)


@dataclass(frozen=True)
class RecordedGroup:
    """The captions of one image: the record's id, place in the step, place in the dataset, and digest of its pixels."""

    record: str
    place: int
    record_index: int
    pixels: str
    captions: tuple[RecordedCaption, ...]
    prompt_token_ids: tuple[int, ...]

    def as_rollouts(self, by: str) -> RolloutGroup:
        """As the engine gave it; `by` says in messages who saw the pixels."""
        seen = SeenRecord(self.record_index, self.record, self.pixels, by)
        return RolloutGroup(self.place, self.prompt_token_ids, tuple(c.rollout for c in self.captions), seen)


@dataclass(frozen=True)
class RecordedStep:
    header: Header
    groups: tuple[RecordedGroup, ...]


@dataclass(frozen=True)
class FinishedCaptions:
    """A step's N captions as the trainer has them before its updates, and after them.

    step: the number of steps done with this one; advantages: on any device, of all captions, group after group
    names: of the components, in the order of `advantages.per_component`
    numbers: which of the N captions are trained on; N' of them
    trained_logprobs: [N'] of these, on any device (`RecordedCaption.trained_logprob`); None before the updates
    staleness: of the first captions, as many as it is known of (`RecordedCaption.staleness`)
    """

    step: int
    groups: Sequence[RolloutGroup]
    judged: Sequence[Sequence[JudgedCaption]]
    names: Sequence[str]
    advantages: Advantages
    numbers: Sequence[int]
    staleness: Sequence[float]
    trained_logprobs: Tensor | None = None

    def recorded(self, keep: Keep) -> RecordedStep:
        values, gated = self.advantages.values.tolist(), self.advantages.gated.tolist()
        components = self.advantages.per_component.T.tolist()
        trained = {} if self.trained_logprobs is None else dict(zip(self.numbers, self.trained_logprobs.tolist()))
        staleness = dict(enumerate(self.staleness))
        first, groups = 0, []
        for group, judged in zip(self.groups, self.judged, strict=True):
            captions = [
                RecordedCaption(
                    number=number,
                    text=rollout.text,
                    finished=rollout.finished,
                    components=dict(said.score.components),
                    judgement=said.judgement,
                    length=said.score.length,
                    reference_length=said.score.reference_length,
                    gated=gated[first + number],
                    advantage=values[first + number],
                    advantages=dict(zip(self.names, components[first + number], strict=True)),
                    trained_logprob=trained.get(first + number),
                    staleness=staleness.get(first + number),
                    token_ids=rollout.token_ids,
                    logprobs=rollout.logprobs,
                )
                for number, (rollout, said) in enumerate(zip(group.rollouts, judged, strict=True))
            ]
            first += len(captions)
            kept = captions if keep == "all" else extremes(captions)
            seen = group.seen
            groups.append(
                RecordedGroup(seen.id, group.place, seen.index, seen.pixels, tuple(kept), group.prompt_token_ids)
            )
        return RecordedStep(Header(VERSION, self.step, keep, len(groups)), tuple(groups))


def extremes(captions: Sequence[RecordedCaption]) -> list[RecordedCaption]:
    """The best and the worst by advantage, in their order."""
    chosen = {f(captions, key=lambda caption: caption.advantage).number for f in (max, min)}
    return [caption for caption in captions if caption.number in chosen]


_HEADER, _GROUP = TypeAdapter(Header), TypeAdapter(RecordedGroup)
_ANY_HEADER = TypeAdapter(AnyHeader)


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.jsonl.gz"


def steps_on_record(folder: Path) -> list[int]:
    """Ascending."""
    return sorted(int(match[1]) for path in folder.glob("step_*") if (match := FILE.fullmatch(path.name)))


def write_step(folder: Path, step: RecordedStep) -> Path:
    """Write a step's file whole or not at all."""
    path = step_file(folder, step.header.step)
    partial = path.with_name(path.name + ".partial")
    lines = (to_json(value, inf_nan_mode="constants") + b"\n" for value in (step.header, *step.groups))
    with open(partial, "wb") as file:
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as packed:
            packed.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def read_step(folder: Path, step: int) -> RecordedStep:
    """Raises UserError for a step that is not there, naming those that are, or whose file is damaged."""
    path = step_file(folder, step)
    if not path.is_file():
        raise UserError(f"{path} is not there: step {step} is not on record", remedy=_what_there_is(folder))
    try:
        with gzip.open(path) as file:
            first = file.readline(MOST_BYTES)
            version = _ANY_HEADER.validate_json(first)["version"]
            if version > VERSION:
                raise UserError(
                    f"{path} has format {version}, and this program reads up to {VERSION}",
                    remedy="use the version of BalCap-Mega that the run was made with",
                )
            header = _HEADER.validate_json(first)
            groups = tuple(_GROUP.validate_json(line) for line in iter(lambda: file.readline(MOST_BYTES), b""))
        if len(groups) != header.groups or header.step != step:
            raise ValueError(f"{len(groups)} images instead of the {header.groups} of step {header.step}")
    except (OSError, EOFError, zlib.error, ValidationError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason})", remedy="delete it, or give another step") from error
    return RecordedStep(header, groups)


def _what_there_is(folder: Path) -> str:
    steps = steps_on_record(folder)
    if not steps:
        return "give the folder of a run with rollouts.keep=all or extremes that has taken a step"
    return f"give one of {ranges(steps)}"


def ranges(steps: Iterable[int]) -> str:
    """1-3, 7"""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in spans)
