"""What a person sees of a run: its facts, one line a step, the evaluations. A plain log gets the same."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from balcap_mega.algorithm.advantages import component_weights
from balcap_mega.config.schema import JUDGED, RunConfig
from balcap_mega.data.inputs import RunInputs
from balcap_mega.parallel.groups import ProcessGrid
from balcap_mega.training.guard.health import Finding
from balcap_mega.training.learner import UpdateResult

HEADING_EVERY = 20  # lines
WARMUP_LINES = 10
SPEED_WINDOW = 10  # steps whose mean duration the remaining time is reckoned with
PLAIN_WIDTH = 200  # of a log that is no terminal
SHORT = {"precision": "prec", "linguistic": "ling"}  # names of components, as a step's line has room for

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Column:
    """One number of a step's line. needs: the metric without which a run does not show it"""

    title: str
    width: int
    text: Callable[[Metrics], str]
    style: str = ""
    needs: str = ""

    def cell(self, text: str, style: str | None = None) -> Text:
        return Text(text.rjust(self.width), style=self.style if style is None else style)


def percent(key: str) -> Callable[[Metrics], str]:
    return lambda metrics: f"{100 * metrics[key]:.1f}"


def number(key: str, form: str) -> Callable[[Metrics], str]:
    return lambda metrics: format(metrics[key], form)


REWARD_COLUMN = Column("b-Cap", 6, percent("reward/b_capscore"), "bold cyan")
COLUMNS = (
    Column("gated%", 7, percent("reward/gate_rate")),
    Column("length", 7, number("reward/length_ratio", ".2f")),
    Column("cut%", 6, percent("rollout/truncated")),
    Column("KL", 9, lambda m: f"{m['policy/kl_reference'] or m['policy/kl_old']:.1e}"),
    Column("clip%", 6, percent("policy/clip_fraction")),
    Column("entropy", 8, number("policy/entropy", ".3f")),
    Column("mismatch", 9, number("rollout/logprob_difference_max", ".1e")),
    Column("tok/s/GPU", 10, number("throughput/tokens_per_second_per_gpu/sample", ".0f")),
    Column("MFU%", 6, percent("mfu/update"), needs="mfu/update"),
    Column("step s", 7, number("seconds/step", ".1f")),
    Column("rollout", 8, number("seconds/rollout", ".1f"), "dim"),
    Column("judge", 6, number("seconds/rewards", ".1f"), "dim"),
    Column("update", 7, number("seconds/update", ".1f"), "dim"),
    Column("refit", 6, number("seconds/refit", ".1f"), "dim"),
)

JUDGE_COLUMNS = (  # of a judge that is asked over a network
    Column("at once", 8, number("judge/concurrency", ".0f"), "dim"),
    Column("written", 8, number("judge/completion_tokens", ".0f"), "dim"),
    Column("read", 9, number("judge/prompt_tokens", ".0f"), "dim"),
    Column("cached%", 8, lambda m: f"{100 * m['judge/cached_tokens'] / max(m['judge/prompt_tokens'], 1):.0f}", "dim"),
    Column("retries", 8, number("judge/retries", ".0f"), "dim"),
    Column("failed", 7, number("judge/failures", ".0f"), "dim"),
)


def columns(components: Iterable[str]) -> list[Column]:
    """The numbers of a step's line: b-CapScore where its three components are there, each component, and the rest."""
    names = {name: SHORT.get(name, name) for name in components}
    rewards = [Column(title, max(len(title) + 1, 6), percent(f"reward/{name}")) for name, title in names.items()]
    return [*([REWARD_COLUMN] if names.keys() >= set(JUDGED) else []), *rewards, *COLUMNS]


class Console:
    """Prints on the first rank; does nothing where `enabled` is False."""

    def __init__(
        self,
        config: RunConfig,
        grid: ProcessGrid,
        inputs: RunInputs,
        *,
        enabled: bool = True,
        file: IO[str] | None = None,
    ) -> None:
        self.config, self.inputs = config, inputs
        self._columns = (
            *columns(config.rewards.components),
            *(JUDGE_COLUMNS if config.rewards.judge == "mllm" else ()),
        )
        self._rich = RichConsole(file=file, quiet=not enabled, highlight=False, soft_wrap=True)
        if not self._rich.is_terminal:
            self._rich.width = PLAIN_WIDTH
        self._lines = 0
        self._durations: deque[float] = deque(maxlen=SPEED_WINDOW)
        self._evaluations: dict[str, Mapping[str, float]] = {}
        self._counts: dict[str, Mapping[str, int]] = {}
        self._header(grid)

    def warmup_step(self, step: int, result: UpdateResult) -> None:
        """About ten lines for the whole warm-up; `step` counts from 0."""
        total = self.config.warmup.steps
        if step == 0:
            self._section(f"Supervised warm-up, {total} steps of {self.config.warmup.batch_size} captions")
        if step == 0 or step + 1 == total or (step + 1) % max(1, total // WARMUP_LINES) == 0:
            self._rich.print(
                f"{_progress(step, total)}  loss {result.loss:7.4f}  gradient norm {result.gradient_norm:6.2f}"
            )

    def evaluation(self, name: str, scores: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """A table of held-out scores; the second evaluation shows the first beside it, and the change.

        counts: over how many captions each score is
        """
        self._evaluations[name], self._counts[name] = scores, counts
        self._section(f"Held-out evaluation, {name} reinforcement learning, {self.inputs.held_out.count} images")
        names = list(self._evaluations)
        table = Table(box=SIMPLE_HEAD)
        table.add_column("")
        for title in (*names, *(["change"] if len(names) == 2 else []), "captions"):
            table.add_column(title, justify="right")
        for key in scores:
            values = [self._evaluations[title][key] for title in names]
            form = ".2f" if key == "length_ratio" else ".1f"
            change = [format(values[1] - values[0], f"+{form}")] if len(values) == 2 else []
            style = "bold cyan" if key == "b_capscore" else ""
            over = captions_counted([self._counts[title][key] for title in names])
            table.add_row(label(key), *(format(value, form) for value in values), *change, over, style=style)
        self._rich.print(table)

    def step(self, step: int, metrics: Metrics) -> None:
        """One line; `step` counts from 0."""
        total = self.config.steps
        place = _progress(step, total)
        shown = [column for column in self._columns if not column.needs or column.needs in metrics]
        if self._lines == 0:
            self._section(f"Reinforcement learning, to step {total}")
        if self._lines % HEADING_EVERY == 0:
            heads = [column.cell(column.title, "bold") for column in shown]
            self._line([Text("step".ljust(len(place)), "bold"), *heads, Text("    left", "bold")])
        self._lines += 1
        self._durations.append(metrics["seconds/step"])
        left = clock(fmean(self._durations) * (total - step - 1))
        self._line([Text(place), *(column.cell(column.text(metrics)) for column in shown), Text(left.rjust(8))])

    def findings(self, findings: Sequence[Finding]) -> None:
        """What is wrong with the step whose line was the last; one that stops the run is told as its error."""
        for finding in findings:
            if finding.policy != "stop":
                done = "the update was left out" if finding.policy == "skip" else finding.remedy
                self._rich.print(Text(f"  {finding.policy}: {finding} — {done}", "yellow"))

    def warning(self, text: str) -> None:
        self._rich.print(Text(f"  warn: {text}", "yellow"))

    def stopped(self, reason: str) -> None:
        self._section(f"Stopped by {reason}; the same command goes on from here")

    def finished(self, folder: Path) -> None:
        self._section(f"Done. Everything is in {folder}, the report in {folder / 'report.html'}")

    def _header(self, grid: ProcessGrid) -> None:
        self._section("BalCap-Mega")
        facts = run_facts(self.config, self.inputs) | {
            "layout": f"tensor {grid.tensor_size} x pipeline {grid.pipeline_size} x data {grid.data_size}, "
            f"rollout tensor {self.config.rollout.tensor_parallel}"
        }
        for name, fact in facts.items():
            self._rich.print(Text(f"  {name:<10}", "dim") + Text(fact))
        for caution in cautions(self.config):
            self.warning(caution)

    def _section(self, title: str) -> None:
        self._rich.print()
        self._rich.print(Text(title, "bold"))

    def _line(self, cells: Sequence[Text]) -> None:
        # A narrow terminal cuts the line off, so that a step stays one line; a log has room for all of it.
        self._rich.print(Text.assemble(*cells), no_wrap=True, overflow="ellipsis", soft_wrap=False)


def run_facts(config: RunConfig, inputs: RunInputs) -> dict[str, str]:
    """What a reader needs to know of a run, one short line each."""
    rollout, algorithm, model = config.rollout, config.algorithm, config.model
    source = config.data.source if config.data.path is None else f"{config.data.source}, {config.data.path}"
    weights = ", ".join(
        f"{name} {weight:g}" for name, weight in component_weights(tuple(config.rewards.components), algorithm).items()
    )
    control = {
        "gate": f"length gate [{algorithm.gate.lower:g}, {algorithm.gate.upper:g}] {algorithm.gate.unit}",
        "linear": f"linear length penalty {algorithm.linear_penalty:g}",
        "none": "no length control",
    }[algorithm.length_control]
    return {
        "output": config.output_dir,
        "policy": model.path or f"{model.tiny}, small, randomly initialised",
        "data": f"{source}: {inputs.rows.count} to train on, {inputs.held_out.count} held out",
        "steps": f"{config.steps} of {rollout.prompts_per_step} images x {rollout.group_size} captions",
        "algorithm": f"{algorithm.normalization} ({weights}), {control}",
        "numbers": f"{model.dtype}, seed {config.seed}, learning rate {config.optimizer.learning_rate:g}",
    }


def cautions(config: RunConfig) -> list[str]:
    """What a run may be set to, but has a price that no metric shows."""
    top_p = config.rollout.top_p
    if top_p == 1.0:
        return []
    return [
        f"rollout.top_p={top_p:g}: captions come from the nucleus alone, while ratio, KL and mismatch are those of the "
        "whole distribution and show nothing of it; the bias is not corrected, rollout.top_p=1 has none"
    ]


def captions_counted(counts: Sequence[int]) -> str:
    """Over how many captions scores are, in words: one number where all are over as many."""
    return " / ".join(map(str, dict.fromkeys(counts)))


def label(key: str) -> str:
    """A score's name as people read it."""
    return {"b_capscore": "b-CapScore", "length_ratio": "length ratio"}.get(key, key)


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _progress(step: int, total: int) -> str:
    return f"{step + 1:>{len(str(total))}}/{total}"
