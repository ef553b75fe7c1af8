"""What the quickstart learns: one run a seed, and a table and a figure over all of them.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--runs DIR] [--json FILE] [--figure FILE.svg] [key=value ...]

A seed whose run is finished already is not run again. Scores are those of 256 held-out scenes with greedy captions,
0-100; the figure shows the sampled captions of each step.
"""

import argparse
import json
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


def draw(runs: Sequence[dict], path: Path) -> None:
    """Each score by step: the mean over the runs, and the range that they span."""
    figure = Figure(figsize=(8, 3.2), layout="constrained", facecolor="none")
    axes = figure.subplots(subplot_kw={"facecolor": "none"})
    for score, name in SCORES.items():
        curves = [moving_average([100 * step[f"reward/{score}"] for step in run["steps"]]) for run in runs]
        steps = np.arange(1, len(curves[0]) + 1)
        axes.fill_between(steps, np.min(curves, axis=0), np.max(curves, axis=0), color=COLOURS[score], alpha=0.15)
        width = 3 if score == "b_capscore" else 1.5
        axes.plot(steps, np.mean(curves, axis=0), color=COLOURS[score], linewidth=width, label=name)
    axes.set_xlabel("step", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=INK, alpha=0.25)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    runs = [run(seed, arguments.runs / f"seed{seed}", arguments.overrides) for seed in arguments.seeds]
    print(table(runs))
    if arguments.json:
        kept = [{key: run[key] for key in ("seed", "before", "after", "seconds")} for run in runs]
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if arguments.figure:
        draw(runs, arguments.figure)


if __name__ == "__main__":
    main()
