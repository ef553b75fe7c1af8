"""vLLM's weight-transfer interface, in the form that both vLLM 0.32 and vLLM 0.24 accept.

Importing this module imports vLLM; vLLM itself imports it by the name `REFIT_WORKER` in `balcap_mega.rollout.engine`.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

InitInfo = TypeVar("InitInfo", bound=WeightTransferInitInfo)
UpdateInfo = TypeVar("UpdateInfo", bound=WeightTransferUpdateInfo)

_WORKER_CALLS_BACKEND = hasattr(WeightTransferEngine, "start_weight_update")
"""Whether vLLM's worker passes the start and the finish of an update on to the backend. That of vLLM 0.24 does not."""


class WeightTransferBackend(WeightTransferEngine[InitInfo, UpdateInfo]):
    """A backend that receives weights by `write`. The trainer sends them itself, and nothing is held between updates.

    `finalise_seconds` is how long the last update spent on packing and quantising, which is no transfer of weights.
    """

    supports_draft_weight_update = False
    trainer_send_weights = None  # abstract in vLLM 0.24
    finalise_seconds = 0.0

    def receive_weights(self, update_info: UpdateInfo, load_weights: None = None) -> None:
        """vLLM's name for `write`. vLLM 0.24 passes `load_weights`, a function that writes weights of whole layers."""
        self.write(update_info)

    @abstractmethod
    def write(self, update_info: UpdateInfo) -> None:
        """Write one part of an update into the model's parameters."""

    def shutdown(self) -> None:
        pass


class RefitWorker:
    """Methods that vLLM adds to its worker: the engine names this class as `worker_extension_cls`."""

    # What the worker has. Without values, so that they do not stand in its way.
    weight_transfer_engine: WeightTransferBackend
    start_weight_update: Callable[..., None]
    finish_weight_update: Callable[[], None]

    def start_refit(self) -> None:
        if _WORKER_CALLS_BACKEND:
            self.start_weight_update()
        else:  # vLLM 0.24 would lay all layers out for a checkpoint's weights, were it not told otherwise
            self.start_weight_update(is_checkpoint_format=False)
            self.weight_transfer_engine.start_weight_update()

    def finish_refit(self) -> float:
        """Returns the update's `finalise_seconds`."""
        self.finish_weight_update()
        if not _WORKER_CALLS_BACKEND:
            self.weight_transfer_engine.finish_weight_update()
        return self.weight_transfer_engine.finalise_seconds
