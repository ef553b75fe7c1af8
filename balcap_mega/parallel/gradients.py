"""From gradients to an update: Megatron's data-parallel wrapper, the last reductions, its optimizer."""

from typing import Any, Literal

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from balcap_mega.config.schema import OptimizerConfig, ParallelConfig
from balcap_mega.parallel.groups import tensor_group
from balcap_mega.parallel.master_weights import PrecisionAwareOptimizer
from balcap_mega.parallel.platform import calls_megatron

PARTIAL_OVER_TENSOR_PARALLEL = "partial_over_tensor_parallel"
"""Attribute of a parameter that every tensor-parallel rank has whole, but whose gradient each has only a part of."""


def finalize_gradients(model, num_tokens=None, **kwargs) -> None:
    """Megatron's `finalize_model_grads`, then a sum over TP of the gradients marked as partial there."""
    finalize_model_grads(model, num_tokens, **kwargs)
    group = tensor_group()
    if group.size() == 1:
        return
    partial = [
        parameter.main_grad
        for chunk in model
        for parameter in chunk.parameters()
        if parameter.requires_grad and getattr(parameter, PARTIAL_OVER_TENSOR_PARALLEL, False)
    ]
    if partial:
        flat = _flatten_dense_tensors(partial)
        torch.distributed.all_reduce(flat, group=group)
        for gradient, summed in zip(partial, _unflatten_dense_tensors(flat, partial), strict=True):
            gradient.copy_(summed)


@calls_megatron
def wrap_ddp(
    policy: MegatronModule, config: ParallelConfig, main_grads_dtype: Literal["float32", "bfloat16"] = "float32"
) -> DistributedDataParallel:
    """Give every trained parameter a `main_grad` in contiguous buffers, reduced over data-parallel ranks.

    Load weights first: the buffers take the parameters over, and the optimizer copies them.
    main_grads_dtype: bfloat16 for bfloat16 parameters only
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=main_grads_dtype == "float32",
        overlap_grad_reduce=config.overlap_grad_reduce,
        bucket_size=config.bucket_size,
        use_distributed_optimizer=config.distributed_optimizer,
        check_for_nan_in_grad=False,  # the step reports a non-finite gradient norm, with the metrics around it
    )
    model_config = get_model_config(policy)
    model = DistributedDataParallel(model_config, ddp_config, policy)
    if config.overlap_grad_reduce:
        model_config.no_sync_func = model.no_sync  # by which the schedule says that a microbatch is not the last
    return model


@calls_megatron
def build_optimizer(
    model: DistributedDataParallel, config: OptimizerConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """AdamW with float32 master weights and global gradient clipping, sharded over data-parallel ranks if asked for.

    Its moments have the dtypes that `config` says. The precision-aware one needs Transformer Engine.

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
            **_precision(config),
        ),
        [model],
    )
    if config.precision_aware:
        for part in built.chained_optimizers:  # pyright: ignore[reportAttributeAccessIssue] (the builder chains one)
            part.__class__ = PrecisionAwareOptimizer  # Megatron's builder knows no other class than its own
    for group in built.param_groups:
        # Megatron leaves this product to its learning-rate scheduler; without one, vectors would be decayed.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return built


def _precision(config: OptimizerConfig) -> dict[str, Any]:
    """Fields of Megatron's OptimizerConfig. Its `main_grads_dtype` is the buffers' matter unless the optimizer reads
    gradients from there as they are."""
    if not config.precision_aware:
        return {}
    dtypes = ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    return {"use_precision_aware_optimizer": True} | {name: getattr(torch, getattr(config, name)) for name in dtypes}
