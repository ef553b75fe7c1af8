"""A refit of the real plan and buffers into an engine that is not there."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from balcap_mega.config.schema import RolloutConfig, RunConfig
from balcap_mega.planning.dry_run.device import META, DryDevice
from balcap_mega.planning.dry_run.replaced import replaced
from balcap_mega.rollout.refit import build_refit, exchange
from balcap_mega.rollout.refit.refit import RefitReport
from balcap_mega.training.learner import Learner


@dataclass(frozen=True)
class _NoEngine:
    """What a refit asks of an engine. Its parameters are not here: what would be written there is dropped."""

    config: RolloutConfig
    dtype: torch.dtype
    vision_data_parallel: bool
    device: torch.device = META

    @property
    def llm(self) -> Any:
        return SimpleNamespace(collective_rpc=_answer)

    def wake_weights(self) -> None:
        pass

    def wake_cache(self) -> None:
        pass

    def reset_caches(self) -> None:
        pass


def _answer(method: str, kwargs: Mapping[str, Any]) -> list[float]:
    return [0.0]


def _no_wait(work: torch.distributed.Work, timeout: float) -> None:
    """Nobody answers."""


def refit_dry(learner: Learner, config: RunConfig, device: DryDevice) -> RefitReport:
    """What an ordinary refit of this rank moves, one that compares no checksums."""
    rollout = config.rollout.model_copy(update={"verify_refit_every": 0})
    whole_vision = learner.architecture.family.vision_data_parallel and rollout.tensor_parallel > 1
    engine = _NoEngine(rollout, learner.platform.dtype(config.model.dtype), whole_vision)
    with device.ledger.during("refit"), device.ledger.of_kind("other"), replaced((exchange, "wait", _no_wait)):
        return build_refit(learner.policy, engine, config.parallel).run()
