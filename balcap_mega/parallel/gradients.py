"""From gradients to an update: Megatron's data-parallel wrapper, the last reductions, its optimizer."""

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config

from balcap_mega.config.schema import OptimizerConfig, ParallelConfig
from balcap_mega.parallel.platform import calls_megatron

PARTIAL_OVER_TENSOR_PARALLEL = "partial_over_tensor_parallel"
"""Attribute of a parameter that every tensor-parallel rank has whole, but whose gradient each has only a part of."""


def finalize_gradients(model, num_tokens=None, **kwargs) -> None:
    """Megatron's `finalize_model_grads`, then a sum over TP of the gradients marked as partial there."""
    finalize_model_grads(model, num_tokens, **kwargs)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    partial = [
        parameter.main_grad
        for chunk in model
        for parameter in chunk.parameters()
        if parameter.requires_grad and getattr(parameter, PARTIAL_OVER_TENSOR_PARALLEL, False)
    ]
    if partial:
        flat = torch._utils._flatten_dense_tensors(partial)
        torch.distributed.all_reduce(flat, group=group)
        for gradient, summed in zip(partial, torch._utils._unflatten_dense_tensors(flat, partial), strict=True):
            gradient.copy_(summed)


@calls_megatron
def wrap_ddp(policy: MegatronModule, config: ParallelConfig) -> DistributedDataParallel:
    """Give every trained parameter a float32 `main_grad` in contiguous buffers, reduced over data-parallel ranks.

    Load weights first: the buffers take the parameters over, and the optimizer copies them.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.distributed_optimizer,
        check_for_nan_in_grad=False,  # the step reports a non-finite gradient norm, with the metrics around it
    )
    return DistributedDataParallel(get_model_config(policy), ddp_config, policy)


@calls_megatron
def build_optimizer(
    model: DistributedDataParallel, config: OptimizerConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """AdamW with float32 master weights and global gradient clipping, sharded over data-parallel ranks if asked for.

    Before each step's schedule call `model.zero_grad_buffer()` and `optimizer.zero_grad()`. `optimizer.step()` then
    returns (updated, gradient norm before clipping, None). Vectors (norms, biases) are not decayed.
    """
    dtype = get_model_config(model).params_dtype
    built = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.max_grad_norm,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        [model],
    )
    for group in built.param_groups:
        # Megatron leaves this product to its learning-rate scheduler; without one, vectors would be decayed.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return built
