"""What the ablations run, and what the paper, or this project, says will come of each."""

import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Claim:
    """Of `measure` the method compared with has more (`more`) or less than the variant.

    by: "paper", whose CaptionQA is `utility` here and whose CapArena is `arena`; "paper, measure ours" where the paper
    says that one is better and not by what; "ours"
    """

    measure: str
    more: bool
    by: str = "paper"


@dataclass(frozen=True)
class Variant:
    """Keys in place of the full method's; what is claimed of `against` beside it."""

    overrides: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    against: str = "full"


def _more(*measures: str, by: str = "paper") -> tuple[Claim, ...]:
    return tuple(Claim(measure, more=True, by=by) for measure in measures)


def _alone(component: str) -> tuple[str, ...]:
    weights = ", ".join(f"{name}: {int(name == component)}" for name in ("precision", "recall", "linguistic"))
    return (f"algorithm.weights={{{weights}}}",)


def _gate(lower: float, upper: float) -> tuple[str, ...]:
    return (f"algorithm.gate.lower={lower}", f"algorithm.gate.upper={upper}")


def _unreliable(zero: bool) -> tuple[str, ...]:
    """30 % of the judgements fail. The components have names of their own: these sources are no judge's."""
    names = {"exact": "precision", "complete": "recall", "readable": "linguistic"}
    components = {
        name: {
            "source": "unreliable:Unreliable",
            "path": str(HERE),
            "options": {"component": component, "share": 0.3, "zero": zero},
        }
        for name, component in names.items()
    }
    return (
        f"rewards.components={json.dumps(components)}",
        "algorithm.weights={exact: 1, complete: 1, readable: 1}",
        "algorithm.gate.components=[readable]",
        "rewards.max_missing_fraction=1",
    )


VARIANTS = {
    "full": Variant(),  # with the gate [0.5, 2]
    "grpo": Variant(("algorithm.normalization=grpo",), _more("dcscore", "utility", "arena")),
    "no_pointability": Variant(("rewards.pointability=false",), _more("dcscore", "utility", "arena")),
    "no_linguistic": Variant(
        ("algorithm.weights={precision: 1, recall: 1, linguistic: 0}",),
        (*_more("arena"), Claim("length", more=False)),
    ),
    "precision_alone": Variant(_alone("precision"), _more("b_capscore", "utility", by="ours")),
    "recall_alone": Variant(
        _alone("recall"), (*_more("b_capscore", by="ours"), Claim("length", more=False, by="ours"))
    ),
    "linguistic_alone": Variant(_alone("linguistic"), _more("b_capscore", "utility", "dcscore", by="ours")),
    "no_length_control": Variant(("algorithm.length_control=none",), _more("length")),
    "linear_penalty": Variant(
        ("algorithm.length_control=linear",), _more("b_capscore", "arena", by="paper, measure ours")
    ),
    "gate_0.5_1": Variant(_gate(0.5, 1.0), _more("utility", "dcscore")),
    "gate_0.5_4": Variant(
        _gate(0.5, 4.0), (Claim("utility", more=False), Claim("dcscore", more=False), Claim("arena", more=True))
    ),
    "no_whitening": Variant(("algorithm.whiten=false",)),
    "missing_masked": Variant(_unreliable(zero=False)),
    "missing_as_zero": Variant(
        _unreliable(zero=True),
        _more("b_capscore", "utility", "arena", by="ours"),
        against="missing_masked",
    ),
    "one_step_ahead": Variant(("rollout.ahead=1",)),
}
