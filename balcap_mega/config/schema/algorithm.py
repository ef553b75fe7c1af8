"""From rewards to the loss."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from balcap_mega.config.schema.base import NonNegative, Section


class LengthGateConfig(Section):
    """Caption length over reference length, both in `unit`; the bounds are inclusive. τ_l and τ_u of BalCapRL."""

    lower: NonNegative = 0.5
    """τ_l: least length over reference length that passes."""
    upper: NonNegative = 2.0
    """τ_u: largest length over reference length that passes."""
    unit: Literal["words", "tokens"] = "words"
    """Words of any script: what stands between blanks, and where words have none between them, by their letters
    (`balcap_mega.algorithm.words`)."""
    components: tuple[str, ...] = ("linguistic",)
    """Rewards that length control acts on, the gate and the linear penalty alike."""

    @model_validator(mode="after")
    def ordered(self):
        if self.lower > self.upper:
            raise ValueError(
                f"lower={self.lower} is above upper={self.upper}, no caption would pass; "
                "give lower <= upper, such as 0.5 and 2.0"
            )
        return self


class AlgorithmConfig(Section):
    """Rewards to gradient. Weights go by name, never by position; a component that has none weighs 1."""

    weights: dict[str, NonNegative] = {
        "precision": 1.0,
        "recall": 1.0,
        "linguistic": 1.0,
    }
    """Of each reward in the sum of normalised rewards."""
    normalization: Literal["gdpo", "grpo"] = "gdpo"
    """gdpo: normalise each reward in its group, then sum. grpo: sum, then normalise."""
    length_control: Literal["gate", "linear", "none"] = "gate"
    """What becomes of the rewards `gate.components` of captions that are too long or too short."""
    gate: LengthGateConfig = LengthGateConfig()
    """The bounds of `length_control: gate`."""
    linear_penalty: NonNegative = 1.0
    """Slope of `length_control: linear`."""
    whiten: bool = True
    """Normalise advantages over the batch, by sequence."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε_low: ratios below 1 - ε_low are clipped."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """ε_high: ratios above 1 + ε_high are clipped."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the ratio where the advantage is negative; null: none."""
    kl_weight: NonNegative = 0.0
    """Of the KL divergence (k3) from the policy that RL started with; 0: none, and no reference is kept."""
    importance: Literal["truncate", "token_band", "sequence_band"] = "truncate"
    """How the loss corrects for captions that come from another policy than the one that an update begins with: from
    the engine, and with rollout.ahead from weights one update older. By w, the probability of a token under the latter
    over that under the former. truncate: weight min(w, importance_cap). token_band (IcePop): weight w, and 0 outside
    importance_token_band. sequence_band: that of truncate, and 0 for all tokens of a caption whose geometric mean of w
    is outside importance_sequence_band."""
    importance_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """Largest weight of truncate and sequence_band; null: all their weights are 1, which under truncate corrects
    nothing."""
    importance_token_band: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 5.0)
    """Least and largest w of a token that token_band trains on."""
    importance_sequence_band: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.9, 1.1)
    """Least and largest geometric mean of w of a caption that sequence_band trains on."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"
    """How token losses become one loss."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole sequence."""
    entropy_weight: NonNegative = 0.0
    """Of the entropy bonus."""
    truncated: Literal["score", "mask"] = "score"
    """What a caption is worth that was cut at rollout.max_tokens. score: what the judge says of it. mask: it counts in
    its group's mean and deviation, but is left out of the loss."""
    fused: bool = True
    """Use the Triton kernels where they can run."""

    @property
    def corrects(self) -> bool:
        """Whether `importance` does anything."""
        return self.importance != "truncate" or self.importance_cap is not None

    @field_validator("importance_token_band", "importance_sequence_band")
    @classmethod
    def around_one(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not band[0] < 1 < band[1]:
            raise ValueError(
                f"{list(band)} leaves out what both policies agree on; give a number below 1 and one above, such as "
                "[0.5, 5.0]"
            )
        return band

    @model_validator(mode="after")
    def some_weight(self):
        if not any(self.weights.values()):
            raise ValueError("every weight is 0; give at least one component a positive weight")
        return self
