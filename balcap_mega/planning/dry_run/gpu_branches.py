"""The branches of a run on GPUs, over a device of shapes: what is native there is stood in for by what it allocates.

Everything else, all of Megatron's and this package's Python included, is what a GPU would run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from packaging.version import Version
from torch import Tensor

from balcap_mega.algorithm import lm_head, logits, policy_loss
from balcap_mega.models import attention, layer_specs, policy
from balcap_mega.models.attention_backends import flash
from balcap_mega.models.attention_backends.pattern import Range, lengths
from balcap_mega.parallel.platform import Platform
from balcap_mega.planning.dry_run.device import META, DryDevice
from balcap_mega.planning.dry_run.replaced import replaced

STAND_INS = {
    "flash attention": "output, log-sum-exps and the scratch of its backward pass; FLOPs of the pairs in the pattern",
    "attention of pictures": "PyTorch's flash attention: output and log-sum-exps; FLOPs of all pairs",
    "norm in linear": "of Transformer Engine: input, output and a number a row are kept; then Megatron's linear",
    "RMSNorm": "PyTorch's fused one: input, output and a number a row are kept",
    "SwiGLU": "Megatron's, compiled: input and output alone",
    "AdamW": "Transformer Engine's: two moments in float32, no scratch",
    "gradient norm": "Transformer Engine's: no scratch",
    "head and loss kernels": "everything up to the launch",
}
"""What stands for a kernel that a CPU does not have: the memory it takes and the FLOPs it does. Collectives are counted
and not sent."""


@dataclass(frozen=True)
class GpuPlatform(Platform):
    """A platform that says it is CUDA."""

    @property
    def is_cuda(self) -> bool:
        return True


def gpu_platform() -> Platform:
    return GpuPlatform(META, "gloo")  # whose Megatron is redirected to the dry device


def cpu_platform() -> Platform:
    return Platform(META, "gloo")


@contextmanager
def gpu_branches(device: DryDevice) -> Iterator[None]:
    """Inside, this package and Megatron choose as they do on a GPU that has Transformer Engine."""
    from balcap_mega.kernels import lm_head as lm_head_kernels
    from balcap_mega.kernels import policy_loss as policy_loss_kernels

    def counted(name: str, function: Callable) -> Callable:
        def called(*args: Any, **kwargs: Any) -> Any:
            device.stand_ins[name] += 1
            return function(*args, **kwargs)

        return called

    class Flash(_FlashShapes):
        dry = device

    def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, **options: Any) -> Tensor:
        device.stand_ins["attention of pictures"] += 1
        return _PictureAttention.apply(query, key, value, device)

    swiglu = counted("SwiGLU", lambda states: states.new_empty(*states.shape[:-1], states.shape[-1] // 2))
    launched = _NoLaunch(counted("head and loss kernels", lambda *args, **kwargs: None))

    def accumulate(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
        device.add_flops(2 * d_logits.numel() * hidden.shape[1])

    with (
        torch.compiler.set_stance("force_eager"),
        replaced(
            (attention.SegmentAttention, "_backend_for", lambda self, query: self.backend),
            (flash, "_FlashKernel", Flash),
            (torch.nn.functional, "scaled_dot_product_attention", attend),
            (logits, "use_kernels", lambda tensor: True),
            (policy_loss, "use_kernels", lambda tensor: True),
            (logits, "CHUNK_BYTES", {"meta": logits.CHUNK_BYTES["cuda"]}),
            (lm_head, "accumulate_", accumulate),
            (lm_head_kernels, "statistics_kernel", launched),
            (lm_head_kernels, "gradient_kernel", launched),
            (policy_loss_kernels, "policy_loss_kernel", launched),
            (policy, "transformer_engine_version", lambda: Version("2")),
            (layer_specs, "_transformer_engine_layer", _fused_layer),
            (_NormedColumnLinear, "forward", counted("norm in linear", _NormedColumnLinear.forward)),
            (layer_specs.RMSNorm, "forward", counted("RMSNorm", lambda norm, x: _FusedNorm.apply(x, norm.weight))),
            (fused_bias_swiglu, "swiglu", swiglu),
            (fused_bias_swiglu, "swiglu_back", lambda gradient, states: torch.empty_like(states)),
            (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
            (megatron_optimizer, "Adam", _FusedAdam),
            (distrib_optimizer, "Adam", _FusedAdam),
            (distrib_optimizer, "HAVE_APEX_OR_TE", True),
            (_FusedAdam, "step", counted("AdamW", _FusedAdam.step)),
            (clip_grads, "l2_norm_impl", counted("gradient norm", lambda *args: (torch.empty(1, device=META), None))),
            (clip_grads, "multi_tensor_scale_impl", lambda *args: None),
        ),
    ):
        yield


@contextmanager
def cpu_branches(device: DryDevice) -> Iterator[None]:
    """Inside, all is chosen as on a CPU."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, **options: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)[0]

    with replaced(
        (logits, "CHUNK_BYTES", {"meta": logits.CHUNK_BYTES["cpu"]}),
        (torch.nn.functional, "scaled_dot_product_attention", attend),
    ):
        yield


class _NoLaunch:
    """A Triton kernel that is launched and does nothing."""

    def __init__(self, launch: Callable):
        self._launch = launch

    def __getitem__(self, grid: Any) -> Callable:
        return self._launch


class _FlashShapes:
    """What FlashAttention-2's variable-length calls of PyTorch allocate, and the work inside the pattern."""

    dry: DryDevice

    @classmethod
    def forward(cls, query, key, value, query_ranges, key_ranges, causal, scale):
        cls.dry.stand_ins["flash attention"] += 1
        cls.dry.add_flops(4 * query.shape[1] * query.shape[2] * _pairs(query_ranges, key_ranges, causal))
        return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)

    @classmethod
    def backward(cls, grad, query, key, value, output, lse, query_ranges, key_ranges, causal, scale):
        count, heads, width = query.shape
        cls.dry.add_flops(10 * heads * width * _pairs(query_ranges, key_ranges, causal))
        padded = count + 128 * len(query_ranges)
        _sums = query.new_empty(heads, padded, dtype=torch.float32)
        _d_query = query.new_empty(padded, heads, -(-width // 32) * 32, dtype=torch.float32)
        d_query, d_key, d_value = map(torch.empty_like, (query, key, value))
        if key.shape[1] != heads:  # each query head's own, summed up at the end
            _expanded = [states.new_empty(states.shape[0], heads, width) for states in (key, value)]
        return d_query, d_key, d_value


def _pairs(query_ranges: tuple[Range, ...], key_ranges: tuple[Range, ...], causal: bool) -> int:
    sizes = zip(lengths(query_ranges), lengths(key_ranges))
    return sum(queries * (queries + 1) // 2 if causal else queries * keys for queries, keys in sizes)


class _PictureAttention(torch.autograd.Function):
    """PyTorch's attention of [images, heads, length, width], all pairs; output and log-sum-exps are kept."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, dry: DryDevice) -> Tensor:
        ctx.dry, ctx.flops = dry, 4 * query.numel() * key.shape[-2]
        dry.add_flops(ctx.flops)
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.dry.add_flops(2.5 * ctx.flops)
        return *(torch.empty_like(states) for states in ctx.saved_tensors[:3]), None


class _FusedNorm(torch.autograd.Function):
    """RMSNorm in one kernel: the input and a float32 a row are kept."""

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight, states.new_empty(states.shape[:-1], dtype=torch.float32))
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        states, weight, _ = ctx.saved_tensors
        return torch.empty_like(states), torch.empty_like(weight)


class _NormedColumnLinear(ColumnParallelLinear):
    """Transformer Engine's `LayerNormLinear`: the norm's weight is the linear's."""

    def __init__(self, input_size: int, output_size: int, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(
            torch.empty(input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue] (Megatron reads it)

    def forward(self, states: Tensor, *args, **options):
        return super().forward(_FusedNorm.apply(states, self.layer_norm_weight), *args, **options)


def _fused_layer(decoder, backend):
    linears = (_NormedColumnLinear, _NormedColumnLinear, RowParallelLinear)
    return layer_specs._layer(decoder, backend, *linears, norm=layer_specs.RMSNorm, separate_norms=False)


class _FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's `FusedAdam` with float32 moments: one kernel, in place."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                        "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
                    }
