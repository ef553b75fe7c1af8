"""What the rollout stage yields: G sampled captions for each prompt, with the engine's own logprobs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rollout:
    """One sampled caption.

    token_ids: response tokens, the end-of-sequence token included when `finished`
    logprobs:  one float a token, of softmax(logits / temperature) over the whole vocabulary, before bans and top_p
    text:      decoded without special tokens
    finished:  False when generation was cut at the token limit
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of one prompt. `record_index` finds the record in its dataset, on whatever rank."""

    record_index: int
    prompt_token_ids: tuple[int, ...]  # image tokens expanded, exactly as the engine saw them
    rollouts: tuple[Rollout, ...]
