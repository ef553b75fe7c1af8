"""Captions in flight: sampled, being judged, not yet trained on; and how they outlive the process."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from balcap_mega.errors import UserError
from balcap_mega.rewards.components import Rewarded
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.replicas import Replica
from balcap_mega.rollout.rollouts import RolloutGroup
from balcap_mega.training.judging import Judging
from balcap_mega.training.prompts import Prompts

CAPTIONS_FILE = "captions.json"
"""In a checkpoint: the captions that were in flight."""


@dataclass
class CaptionsInFlight:
    """The captions of one step.

    mine:     those of this rank's engine, once they are sampled
    sampling: the trainer's logprobs of the captions of the step's first prompts, under the weights that the engine
              sampled them with, a caption after the other; empty until they are computed (`off_policy`)
    """

    step: int
    prompts: Prompts
    judging: Judging
    mine: Sequence[RolloutGroup] = ()
    sampling: tuple[tuple[float, ...], ...] = ()

    def sample(self, engine: RolloutEngine, replica: Replica) -> None:
        """Have them generated, and begin to judge each as it is finished. Returns when the last is."""
        self.mine = engine.sample(
            self.prompts.of(replica, engine.render), step=self.step, on_finished=self.judging.submit
        )

    def saved(self, replica: Replica) -> bytes:
        """Everybody's captions as a checkpoint keeps them, on every rank. A collective."""
        captions = replica.gather(list(zip(self.mine, self.judging.so_far(self.mine), strict=True)))
        return _SAVED.dump_json(SavedCaptions(self.step, tuple(captions), self.sampling))

    def go_on(self, saved: "SavedCaptions", replica: Replica) -> None:
        """Take up this rank's share, under whatever layout: what was judged stays so, the rest is judged again."""
        share = replica.shard(saved.captions)
        self.mine = [group for group, _ in share]
        self.sampling = saved.sampling
        for group, rewarded in share:
            self.judging.go_on(group, rewarded)


@dataclass(frozen=True)
class SavedCaptions:
    """What a checkpoint holds of a step's captions: every group with the rewards known so far, and `sampling`."""

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="constants")

    step: int
    captions: tuple[tuple[RolloutGroup, tuple[Rewarded | None, ...]], ...]
    sampling: tuple[tuple[float, ...], ...]


_SAVED = TypeAdapter(SavedCaptions)


def read_captions(checkpoint: Path) -> SavedCaptions | None:
    """The captions that were in flight when the checkpoint was taken; None where there were none.

    Raises UserError for a file that is not as `CaptionsInFlight.saved` has it.
    """
    path = checkpoint / CAPTIONS_FILE
    if not path.exists():
        return None
    try:
        return _SAVED.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(
            f"checkpoint {checkpoint} is damaged: {CAPTIONS_FILE} cannot be read ({str(error)[:300]})",
            remedy="delete it to resume from an older one",
        ) from error
