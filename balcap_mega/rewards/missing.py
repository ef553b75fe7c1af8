"""When too many rewards are missing, a step must not go on as if nothing had happened."""

from collections.abc import Mapping

from balcap_mega.algorithm.batch import RewardBatch
from balcap_mega.errors import UserError


class TooManyMissing(UserError):
    """In a step it is raised before the update, so the policy and the optimizer are still those of the last step."""


def refuse_missing(
    batch: RewardBatch,
    max_fraction: float,
    reasons: Mapping[str, int] | None = None,
    *,
    captions: str = "this step's captions",
) -> None:
    """Raise TooManyMissing where a component is missing for more than `max_fraction` of the captions.

    The one rule for training and for held-out evaluation; `captions` says which they are.
    `batch` is the global batch, so every rank decides the same. `reasons` (failed requests by reason) go into the
    message. A record whose reference has no units counts as a missing recall: it gives no signal either.
    """
    missing = (~batch.valid).double().mean(dim=1)
    worst = max(zip(missing.tolist(), batch.names), default=(0.0, ""))
    if worst[0] > max_fraction:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in zip(batch.names, missing.tolist()))
        met = ", ".join(f"{reason} x{count}" for reason, count in sorted((reasons or {}).items(), key=lambda x: -x[1]))
        none = "not counted" if reasons is None else "none"
        raise TooManyMissing(
            f"the judge failed for too many of {captions}: missing {shares}; "
            f"rewards.max_missing_fraction is {max_fraction:.1%}; failed requests: {met or none}",
            remedy="look at the judge's endpoint (the log has the request ids) and resume from the last checkpoint",
        )
