"""How fast a step was: tokens a second and GPU, and the share of the GPUs' peak that its model FLOPs are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
import torch.distributed

from balcap_mega.config.schema import RunConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.flops import TokenWork, generation_flops, group_work, update_flops, vision_forward
from balcap_mega.parallel.peaks import device_peak
from balcap_mega.rollout.rollouts import RolloutGroup

TOKENS = "throughput/tokens_per_second_per_gpu"


@dataclass(frozen=True)
class Speed:
    """Of the steps of one run. A rank on a CPU counts as a GPU whose peak is not known.

    update_peak, rollout_peak: FLOP/s of one GPU in the format of the learner's and the engine's GEMMs; None if unknown
    """

    architecture: Architecture
    world: int
    trains_vision: bool
    update_peak: float | None
    rollout_peak: float | None

    @classmethod
    def of(cls, config: RunConfig, architecture: Architecture, device: torch.device) -> "Speed":
        peak, dtype = device_peak(device), config.model.dtype
        return cls(
            architecture,
            torch.distributed.get_world_size(),
            not config.model.freeze_vision,
            peak and peak.of(dtype if config.model.fp8 == "none" else "fp8"),
            peak and peak.of("fp8" if config.rollout.fp8 else dtype),
        )

    def metrics(
        self, groups: Sequence[RolloutGroup], sampled: "Sampled", seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """groups: what the step was trained on; sampled: in its rollout phase, over all ranks

        Over the whole step: `sample`, prompts (once a caption, as others count them) and captions, and `response`,
        captions alone. Over their phases: `rollout`, captions, and `update`, each prompt once and its captions.
        mfu/update and mfu/step are left out where a peak is not known.
        """
        work, vision = work_of(groups), self._vision(groups)
        prompts = sum(len(group.prompt_token_ids) * len(group.rollouts) for group in groups)
        step = sum(seconds.values())
        rates = {
            "sample": (prompts + work.responses) / step,
            "response": work.responses / step,
            "rollout": sampled.tokens / seconds["rollout"],
            "update": work.tokens / seconds["update"],
        }
        metrics = {f"{TOKENS}/{name}": rate / self.world for name, rate in rates.items()}
        if self.update_peak is None or self.rollout_peak is None:
            return metrics
        update = update_flops(self.architecture, work, vision, trains_vision=self.trains_vision)
        at_peak = {"update": update / self.update_peak, "rollout": sampled.flops / self.rollout_peak}  # GPU seconds
        return metrics | {
            "mfu/update": at_peak["update"] / self.world / seconds["update"],
            "mfu/step": sum(at_peak.values()) / self.world / step,
        }

    def sampled(self, groups: Sequence[RolloutGroup], device: torch.device) -> "Sampled":
        """What all ranks have sampled, of which `groups` is this one's share. A collective."""
        work = work_of(groups)
        flops = generation_flops(self.architecture, work, self._vision(groups))
        totals = torch.tensor([work.responses, flops], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(totals)
        return Sampled(*totals.tolist())

    def _vision(self, groups: Sequence[RolloutGroup]) -> float:
        image = self.architecture.image_token_id
        return sum(vision_forward(self.architecture, group.prompt_token_ids.count(image)) for group in groups)


@dataclass(frozen=True)
class Sampled:
    """Response tokens, and the FLOPs of generating them."""

    tokens: float
    flops: float


def work_of(groups: Sequence[RolloutGroup]) -> TokenWork:
    return reduce(
        add,
        (group_work(len(group.prompt_token_ids), [len(r.token_ids) for r in group.rollouts]) for group in groups),
        TokenWork(),
    )
