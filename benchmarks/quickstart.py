"""What the quickstart learns: one run a seed, and a table and a figure over all of them.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--runs DIR] [--json FILE] [--figure FILE.svg] [key=value ...]
    python benchmarks/quickstart.py --recorded benchmarks/results/quickstart.json --figure FILE.svg

A seed whose run is finished already is not run again; --recorded runs none, and shows what --json has written before.
Scores are those of 256 held-out scenes with greedy captions, 0-100; the figure shows the sampled captions of each step.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from balcap_mega.training.observe.charts import moving_average
from balcap_mega.training.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SCORES = {"precision": "precision", "recall": "recall", "linguistic": "linguistic", "b_capscore": "b-CapScore"}
COLOURS = dict(zip(SCORES, ("#2f81f7", "#3fb950", "#d29922", "#f85149"), strict=True))
INK = "#808890"  # to be read on white and on black


def run(seed: int, folder: Path, overrides: Sequence[str]) -> dict:
    """The finished run's summary, and each step's metrics."""
    if not (folder / "summary.json").exists():
        command = ["bash", ROOT / "launch" / "quickstart.sh", f"seed={seed}", f"output_dir={folder}", *overrides]
        subprocess.run(command, check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {"seed": seed, **summary, "steps": read_metrics(folder)}


def table(runs: Sequence[dict]) -> str:
    """Markdown: mean over the runs, and what each gained."""
    lines = ["| | before | after | gain | of each seed |", "| --- | --- | --- | --- | --- |"]
    for score, name in (SCORES | {"length_ratio": "caption length / reference length"}).items():
        before, after = ([run[when][score] for run in runs] for when in ("before", "after"))
        gains = [late - early for early, late in zip(before, after, strict=True)]
        form = ".2f" if score == "length_ratio" else ".1f"
        each = ", ".join(f"{gain:+{form}}" for gain in gains)
        lines.append(f"| {name} | {fmean(before):{form}} | {fmean(after):{form}} | {fmean(gains):+{form}} | {each} |")
    return "\n".join(lines)


def sampled(runs: Sequence[dict]) -> dict[str, dict[str, list[float]]]:
    """Each score of each step's sampled captions, smoothed: the mean over the runs, and the range that they span."""
    found = {}
    for score in SCORES:
        curves = [moving_average([100 * step[f"reward/{score}"] for step in run["steps"]]) for run in runs]
        parts = {"mean": np.mean(curves, axis=0), "low": np.min(curves, axis=0), "high": np.max(curves, axis=0)}
        found[score] = {name: [round(float(value), 1) for value in values] for name, values in parts.items()}
    return found


def draw(rewards: dict[str, dict[str, list[float]]], path: Path) -> None:
    """What `sampled` found, a panel a score, with the mean of the first and of the last step."""
    figure = Figure(figsize=(8, 2.5), layout="constrained", facecolor="none")
    panels = figure.subplots(1, len(SCORES), sharex=True, sharey=True, subplot_kw={"facecolor": "none"})
    for axes, (score, name) in zip(panels, SCORES.items(), strict=True):
        mean, low, high = (rewards[score][part] for part in ("mean", "low", "high"))
        steps = range(1, len(mean) + 1)
        axes.fill_between(steps, low, high, color=COLOURS[score], alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=COLOURS[score], linewidth=2, solid_capstyle="round")
        for step, side, above in ((1, "left", False), (len(mean), "right", high[-1] < 95)):
            edge, offset = (high, 5) if above else (low, -13)
            axes.annotate(
                f"{mean[step - 1]:.0f}", (step, edge[step - 1]), (0, offset), textcoords="offset points", ha=side,
                color=INK, fontsize=9,
            )  # fmt: skip
        axes.set_title(name, color=COLOURS[score], fontsize=11, fontweight="bold", loc="left")
        axes.set_xticks([1, len(mean) // 2, len(mean)])
        axes.tick_params(colors=INK, length=0, labelsize=9)
        axes.grid(axis="y", color=INK, alpha=0.25)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    panels[0].set_yticks(range(0, 101, 20))
    panels[0].set_ylim(20, 105)
    figure.supxlabel("step", color=INK, fontsize=9)
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def as_json(recorded: dict) -> str:
    """With each curve on a line of its own."""
    text = json.dumps(recorded, indent=1)
    return re.sub(r"\[[-\d.,\s]+\]", lambda found: " ".join(found[0].split()), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--recorded", type=Path, metavar="FILE.json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if arguments.recorded:
        recorded = json.loads(arguments.recorded.read_text(encoding="utf-8"))
    else:
        runs = [run(seed, arguments.runs / f"seed{seed}", arguments.overrides) for seed in arguments.seeds]
        kept = [{key: run[key] for key in ("seed", "before", "after", "seconds")} for run in runs]
        recorded = {"runs": kept, "rewards": sampled(runs)}
    print(table(recorded["runs"]))
    if arguments.json:
        arguments.json.write_text(as_json(recorded), encoding="utf-8")
    if arguments.figure:
        draw(recorded["rewards"], arguments.figure)


if __name__ == "__main__":
    main()
