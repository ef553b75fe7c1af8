"""What came of the ablations: measures of each run, each variant beside the full method, and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from ablation_runs import Job
from ablation_variants import VARIANTS, Claim
from intervals import Interval, interval
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from balcap_mega.data.scenes import ScenesDataset
from balcap_mega.evaluation.scenes import SceneMeasures, measure
from balcap_mega.training.heldout import read_result
from balcap_mega.training.record.format import read_step, steps_on_record

MEASURES = {
    "utility": "utility",
    "arena": "arena",
    "dcscore": "DCScore",
    "b_capscore": "b-CapScore",
    "length": "length",
    "repetition": "repetition",
    "pointless": "pointless",
}
DRAWN = ("utility", "arena", "dcscore", "b_capscore", "length")
POINTS = 12  # of a curve
INK = "#808890"  # to be read on white and on black


@dataclass(frozen=True)
class Measured:
    """A finished run: its held-out captions' measures, and those of sampled captions, one an image, by step."""

    variant: str
    seed: int
    held_out: SceneMeasures
    curve: dict[int, SceneMeasures]


def measured(job: Job) -> Measured:
    held_out = ScenesDataset(10**9, job.seed, "eval")  # a record is a function of seed and index, whatever the size
    captions = read_result(job.folder / "held_out_after.json").captions
    records = [held_out[caption.record_index] for caption in captions]
    curve = {}
    steps = steps_on_record(job.folder / "rollouts")
    for step in steps[:: -max(len(steps) // POINTS, 1)][::-1]:
        groups = read_step(job.folder / "rollouts", step).groups
        train = ScenesDataset(10**9, job.seed, "train")
        curve[step] = measure([train[g.record_index] for g in groups], [g.captions[0].text for g in groups])
    return Measured(job.variant, job.seed, measure(records, [caption.caption for caption in captions]), curve)


def values(runs: Sequence[Measured], variant: str, name: str) -> dict[int, float]:
    """Of a measure, by seed."""
    return {run.seed: getattr(run.held_out, name) for run in runs if run.variant == variant}


def ahead(runs: Sequence[Measured], variant: str, name: str, against: str | None = None) -> Interval | None:
    """By how much the method compared with has more of a measure, paired by seed; None without a common seed."""
    one, other = values(runs, against or VARIANTS[variant].against, name), values(runs, variant, name)
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    return interval(differences) if differences else None


def verdict(difference: Interval, claim: Claim) -> str:
    """Whether the interval lies on the claimed side of 0, on the other, or on both."""
    low, high = (difference.low, difference.high) if claim.more else (-difference.high, -difference.low)
    return "held" if low > 0 else "not held" if high < 0 else "undecided"


def digits(name: str) -> int:
    return 2 if name == "length" else 1


def means_table(runs: Sequence[Measured], variants: Sequence[str]) -> str:
    """Markdown: each variant's mean, and in brackets full minus variant with its interval."""
    lines = [f"| | seeds | {' | '.join(MEASURES.values())} |", "| --- " * (len(MEASURES) + 2) + "|"]
    for variant in variants:
        cells = []
        for name in MEASURES:
            own = values(runs, variant, name)
            cell = f"{fmean(own.values()):.{digits(name)}f}" if own else "–"
            difference = ahead(runs, variant, name, "full") if variant != "full" else None
            cells.append(cell + (f" ({difference.format(digits(name), '+')})" if difference else ""))
        seeds = len(values(runs, variant, "utility"))
        lines.append(f"| {variant} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(runs: Sequence[Measured], variants: Sequence[str]) -> list[dict]:
    """Each claim about these variants that the runs say something about."""
    found = []
    for variant in variants:
        for claim in VARIANTS[variant].claims:
            difference = ahead(runs, variant, claim.measure)
            if difference is not None:
                against = VARIANTS[variant].against
                found.append(
                    {
                        "claim": f"{against} has {'more' if claim.more else 'less'} {claim.measure} than {variant}",
                        "by": claim.by,
                        "difference": difference.format(digits(claim.measure), "+"),
                        "verdict": verdict(difference, claim),
                    }
                )
    return found


def claims_table(rows: Sequence[dict]) -> str:
    head = ["| claim | whose | difference | by the interval |", "| --- | --- | --- | --- |"]
    chance = f"Were nothing there, {0.025 * len(rows):.1f} of {len(rows)} would be called held, and as many not held."
    return "\n".join([*head, *(f"| {' | '.join(row.values())} |" for row in rows), "", chance])


def draw(runs: Sequence[Measured], variants: Sequence[str], path: Path) -> None:
    """Above: full minus variant with its interval. Below: each measure by step, means over the seeds."""
    figure = Figure(figsize=(3 * len(DRAWN), 3 + 0.25 * len(variants)), layout="constrained", facecolor="none")
    axes = figure.subplots(2, len(DRAWN), squeeze=False, subplot_kw={"facecolor": "none"})
    colours = {variant: f"C{number % 10}" for number, variant in enumerate(variants)}
    others = [variant for variant in variants if variant != "full"]
    for column, name in enumerate(DRAWN):
        forest, curves = axes[0, column], axes[1, column]
        forest.set_title(f"{MEASURES[name]}: full − variant", color=INK, fontsize=9)
        forest.axvline(0, color=INK, linewidth=0.8)
        for row, variant in enumerate(others):
            difference = ahead(runs, variant, name, "full")
            if difference is not None:
                half = difference.half if np.isfinite(difference.half) else 0
                forest.errorbar(difference.mean, -row, xerr=half, fmt="o", color=colours[variant], markersize=4)
        forest.set_yticks([-row for row in range(len(others))], others if column == 0 else [""] * len(others))
        for variant in variants:
            own = [run.curve for run in runs if run.variant == variant and run.curve]
            steps = sorted(set.intersection(*(set(curve) for curve in own))) if own else []
            means = [fmean(getattr(curve[step], name) for curve in own) for step in steps]
            width = 2.5 if variant == "full" else 1
            curves.plot(steps, means, color=colours[variant], linewidth=width, label=variant)
        curves.set_title(MEASURES[name], color=INK, fontsize=9)
        curves.set_xlabel("step", color=INK)
        for axis in (forest, curves):
            axis.tick_params(colors=INK, length=0, labelsize=8)
            axis.grid(axis="both", color=INK, alpha=0.2)
            for spine in axis.spines.values():
                spine.set_visible(False)
    axes[1, -1].legend(frameon=False, labelcolor=INK, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
