"""report.html: what a run did, on one self-contained page with curves, scores and captions before and after."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from balcap_mega.config.load import dump_config
from balcap_mega.config.schema import RunConfig
from balcap_mega.data.inputs import RunInputs
from balcap_mega.data.records import CaptionDataset
from balcap_mega.training.folder import RunFolder, write_text
from balcap_mega.training.heldout import HeldOutCaption, HeldOutResult
from balcap_mega.training.observe.charts import SERIES, Curve, line_chart, stacked_chart
from balcap_mega.training.observe.console import captions_counted, clock, label, run_facts
from balcap_mega.training.observe.metrics import read_metrics
from balcap_mega.training.observe.pages import VERDICTS, ShownCaption, data_url, template
from balcap_mega.training.observe.speed import TOKENS

SAMPLES = 8  # the first held-out images, which no score has chosen


@dataclass(frozen=True)
class Chart:
    """A figure of the page; `svg` is markup of our own making."""

    title: str
    note: str
    legend: tuple[str, ...]
    svg: Markup


def write_report(
    folder: RunFolder,
    config: RunConfig,
    inputs: RunInputs,
    before: HeldOutResult,
    after: HeldOutResult,
    dataset: CaptionDataset,
    changes: str | None = None,
) -> None:
    """Write `folder.report` from the folder's summary.json and metrics.jsonl, and the first captions of `dataset`.

    changes: the page beside it that shows how those captions changed over the run
    """
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    page = template("report_template.html").render(
        changes=changes,
        name=folder.root.resolve().name,
        facts=run_facts(config, inputs),
        score=summary["after"].get("b_capscore"),
        score_before=summary["before"].get("b_capscore"),
        gate=config.algorithm.gate,
        scores=score_rows(summary["before"], summary["after"], before.counts, after.counts),
        eval_size=len(before.captions),
        charts=charts(read_metrics(folder.root), config),
        samples=[
            sample(old, new, dataset)
            for old, new in zip(before.captions[:SAMPLES], after.captions[:SAMPLES], strict=True)
        ],
        verdicts=VERDICTS,
        phases=[(name, clock(seconds), seconds) for name, seconds in summary["seconds"].items()],
        total=clock(sum(summary["seconds"].values())),
        total_seconds=max(sum(summary["seconds"].values()), 1e-9),
        resolved=dump_config(config),
    )
    write_text(folder.report, page)


def score_rows(
    before: Mapping[str, float],
    after: Mapping[str, float],
    counts_before: Mapping[str, int],
    counts_after: Mapping[str, int],
) -> list[dict[str, object]]:
    """Held-out scores as the table shows them, with the number of captions that each is over.

    `start` and `stop` place the change on a track from 0 to 100; a score over no caption stands at 0.
    """
    rows = []
    for key in after:
        form, scale = (".2f", 50.0) if key == "length_ratio" else (".1f", 1.0)  # a length ratio's track ends at 2
        start, stop = (min(max(0.0, scale * value), 100.0) for value in (before[key], after[key]))
        rows.append(
            {
                "label": label(key),
                "main": key == "b_capscore",
                "ratio": key == "length_ratio",
                "before": format(before[key], form),
                "after": format(after[key], form),
                "change": format(after[key] - before[key], f"+{form}").replace("-", "−"),
                "captions": captions_counted([counts_before[key], counts_after[key]]),
                "start": start,
                "stop": stop,
            }
        )
    return rows


def charts(rows: Sequence[Mapping[str, float]], config: RunConfig) -> list[Chart]:
    """The curves of a run; none when no step was taken."""
    if not rows:
        return []
    steps = [int(row["step"]) for row in rows]

    def chart(title: str, note: str, keys: Mapping[str, str], scale: float = 1.0, **options) -> list[Chart]:
        """Of the numbers `keys` has by their labels; nothing where a step lacks one.

        A GPU's peak may not be known, and steps of a version before may not have what this one counts.
        """
        if not all(key in row for key in keys.values() for row in rows):
            return []
        curves = [Curve(name, [scale * row[key] for row in rows]) for name, key in keys.items()]
        legend = tuple(keys) if len(keys) > 1 else ()
        return [Chart(title, note, legend, Markup(line_chart(steps, curves, **options)))]

    gate = config.algorithm.gate
    kl, other = (
        ("kl_reference", "reference policy") if config.algorithm.kl_weight else ("kl_old", "policy before a step")
    )
    mismatch = {"largest": "rollout/logprob_difference_max", "mean": "rollout/logprob_difference"}
    staleness = {"largest": "rollout/staleness_max", "mean": "rollout/staleness"}
    phases = {
        key.removeprefix("seconds/"): [row[key] for row in rows]
        for key in rows[-1]
        if key.startswith("seconds/") and key != "seconds/step"
    }
    longest = dict(sorted(phases.items(), key=lambda item: -sum(item[1]))[: len(SERIES)])
    return [
        *chart("b-CapScore", "Of the sampled training captions, 0–100.", {"": "reward/b_capscore"}, 100),
        *chart(
            "Reward components",
            "As judged, before the length gate, 0–100.",
            {name: f"reward/{name}" for name in config.rewards.components},
            100,
        ),
        *chart(
            "Length ratio",
            f"Caption over reference, in {gate.unit}. The gate passes the shaded range.",
            {"": "reward/length_ratio"},
            band=(gate.lower, gate.upper),
        ),
        *chart("Gate rate", "Captions outside the range, percent.", {"": "reward/gate_rate"}, 100),
        *chart("Entropy", "Of the policy, in nats a token.", {"": "policy/entropy"}),
        *chart("KL divergence", f"From the {other}, in nats a token.", {"": f"policy/{kl}"}),
        *chart("Clipped tokens", "Without gradient, percent.", {"": "policy/clip_fraction"}, 100),
        *chart(
            "Trainer against engine",
            "Absolute difference of their logprobs of the same tokens.",
            mismatch,
            log=all(row.get(key, 0) > 0 for key in mismatch.values() for row in rows),
        ),
        *(
            chart("Staleness", "Absolute difference of logprobs: weights that sampled, weights trained.", staleness)
            if config.rollout.ahead
            else []
        ),
        *chart("Gradient norm", "Before clipping.", {"": "policy/gradient_norm"}),
        Chart("Time", "Seconds a step, by phase.", tuple(longest), Markup(stacked_chart(steps, longest))),
        *chart(
            "Tokens a second and GPU",
            "Over the whole step: captions, and their prompts once a caption.",
            {"": f"{TOKENS}/sample"},
        ),
        *chart(
            "Model FLOPs utilisation",
            "Percent of the GPUs' peak, in the update and over the whole step.",
            {"update": "mfu/update", "step": "mfu/step"},
            100,
        ),
    ]


def sample(before: HeldOutCaption, after: HeldOutCaption, dataset: CaptionDataset) -> dict[str, object]:
    """One image's card: the picture inline, the reference, and both captions in spans with their scores."""
    record = dataset[before.record_index]
    return {
        "image": data_url(record.image),
        "reference": record.reference,
        "captions": [ShownCaption.held_out("Before", before), ShownCaption.held_out("After", after)],
    }
