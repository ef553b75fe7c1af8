"""Megatron-Core's schedule of forward and backward passes over microbatches: 1F1B, or one by one without pipeline."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from balcap_mega.parallel.platform import calls_megatron

Microbatch = TypeVar("Microbatch")
Output = TypeVar("Output")
Metrics = TypeVar("Metrics")

Loss = Callable[[Output], tuple[Tensor, Tensor, Metrics]]
"""Of the last stage's output: (loss summed over the microbatch, int32 normaliser, metrics)."""


@calls_megatron
def run_schedule(
    model: nn.Module,
    microbatches: Sequence[Microbatch],
    forward: Callable[[nn.Module, Microbatch], tuple[Output, Loss]],
    *,
    forward_only: bool = False,
) -> list[Metrics]:
    """Run every microbatch and, unless `forward_only`, leave the step's gradient in the parameters' `main_grad`.

    forward(model, microbatch): returns this stage's output (on the last stage: what the model's objective returned) and
        a function that computes the loss from it. That function is called on the last stage only.

    Gradients are those of sum(loss) / sum(normaliser), both over all microbatches and data-parallel ranks
    (`calculate_per_token_loss`; the division is done once, in `finalize_model_grads`), so a step's gradient does not
    depend on how it was split. Data-parallel ranks may run different numbers of microbatches, pipeline stages may not.

    Returns the metrics in the order of the microbatches on the last stage, and an empty list on the others.
    """
    if not microbatches:
        raise ValueError("a step needs at least one microbatch on every rank")

    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=lambda iterator, stage: forward(stage, next(iterator)),
            data_iterator=iter(microbatches),
            model=model,
            num_microbatches=len(microbatches),
            seq_length=1,  # unused: stages tell each other each row's length (`variable_seq_lengths`)
            micro_batch_size=1,
            forward_only=forward_only,
        )
