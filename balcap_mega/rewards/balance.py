"""b-CapScore of a run whose components may be others than the paper's three."""

from collections.abc import Mapping

from balcap_mega.config.schema import JUDGED
from balcap_mega.rewards.judge import b_capscore


def balance(means: Mapping[str, float]) -> dict[str, float]:
    """{"b_capscore": the harmonic mean of precision, recall and linguistic}, or nothing where one is not there."""
    return {"b_capscore": b_capscore(**{name: means[name] for name in JUDGED})} if means.keys() >= set(JUDGED) else {}
