"""The learner as it is, with what it calls named: the moment that runs, and the kind of memory it allocates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from balcap_mega.models import policy as policy_module
from balcap_mega.planning.dry_run.device import DryDevice
from balcap_mega.planning.dry_run.ledger import BETWEEN, Ledger
from balcap_mega.planning.dry_run.replaced import replaced
from balcap_mega.planning.dry_run.world import neighbours
from balcap_mega.training import learner as learner_module
from balcap_mega.training.learner import Learner
from balcap_mega.training.microbatch import Microbatch


def name_tensors(learner: Learner, ledger: Ledger) -> None:
    """Weights, gradients and optimizer by what they are, whoever allocated them."""
    ledger.name(_of_optimizer(learner), "optimizer")
    ledger.name((p.main_grad for p in learner.policy.parameters() if hasattr(p, "main_grad")), "gradients")  # pyright: ignore[reportAttributeAccessIssue] (Megatron's)
    ledger.name(learner.policy.parameters(), "weights")
    ledger.name(learner.policy.buffers(), "weights")


def _of_optimizer(learner: Learner) -> Iterator:
    for part in learner.optimizer.chained_optimizers:  # pyright: ignore[reportAttributeAccessIssue] (the builder chains one)
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if hasattr(value, "untyped_storage") and value.is_meta)


@contextmanager
def watched(device: DryDevice) -> Iterator[None]:
    """Weights are not read; all else that the learner calls is run."""
    ledger = device.ledger

    def of_kind(function: Callable, kind: str) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with ledger.of_kind(kind):
                return function(*args, **kwargs)

        return wrapped

    schedule, optimizer_of, policy_of = (
        learner_module.run_schedule,
        learner_module.build_optimizer,
        learner_module.build_policy,
    )

    def build_policy(*args: Any, **kwargs: Any):
        with ledger.of_kind("weights"):
            policy = policy_of(*args, **kwargs)
        if policy.post_process:  # what follows the last layer, up to the policy's end, is the head's
            norm = policy.language_model.decoder.final_layernorm
            norm.register_forward_pre_hook(lambda *_: setattr(ledger, "kind", "head"))
            policy.register_forward_hook(lambda *_: setattr(ledger, "kind", "activations"))
        return policy

    def run_schedule(model, microbatches: Sequence[Microbatch], forward, *, forward_only: bool = False):
        moment = ledger.moment
        if moment == BETWEEN:
            moment = "scoring" if forward_only else "forward and backward"
        config = model.config
        ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shapes = [(rows.row.tokens.numel() // ranks, 1, config.hidden_size) for rows in microbatches]
        with ledger.during(moment), ledger.of_kind("activations"), neighbours(shapes, device):
            return schedule(model, microbatches, forward, forward_only=forward_only)

    def build_optimizer(*args: Any, **kwargs: Any) -> MegatronOptimizer:
        with ledger.of_kind("optimizer"):
            optimizer = optimizer_of(*args, **kwargs)
        for name in ("prepare_grads", "get_grad_norm", "step"):
            setattr(optimizer, name, _in_moment(getattr(optimizer, name), ledger))
        return optimizer

    with replaced(
        (learner_module, "check_checkpoint", lambda *args: None),
        (learner_module, "import_checkpoint", lambda *args: None),
        (learner_module, "build_policy", build_policy),
        (learner_module, "wrap_ddp", of_kind(learner_module.wrap_ddp, "gradients")),
        (learner_module, "build_optimizer", build_optimizer),
        (learner_module, "run_schedule", run_schedule),
        (policy_module, "encode_images", of_kind(policy_module.encode_images, "images")),
    ):
        yield


def _in_moment(function: Callable, ledger: Ledger) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with ledger.during("optimizer" if ledger.moment == BETWEEN else ledger.moment):
            return function(*args, **kwargs)

    return wrapped
