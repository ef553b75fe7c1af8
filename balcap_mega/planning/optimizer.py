"""Bytes of each trained parameter beside its weight: gradient, optimizer, and what a step of the optimizer moves."""

from dataclasses import dataclass

from balcap_mega.config.schema import OptimizerConfig
from balcap_mega.planning.hardware import BF16, FP32

SIZES = {"float32": FP32, "bfloat16": BF16}


@dataclass(frozen=True)
class OptimizerBytes:
    """gradient: in the buffers that are reduced, whole on every data-parallel rank
    kept:     master weight and two moments, of a rank's share
    scratch:  more than that, during a step, of its share
    traffic:  read and written in a step, of its share
    """

    gradient: int
    kept: int
    scratch: int
    traffic: int

    @classmethod
    def of(cls, config: OptimizerConfig) -> "OptimizerBytes":
        gradient, moments = (
            SIZES[config.main_grads_dtype],
            [SIZES[config.exp_avg_dtype], SIZES[config.exp_avg_sq_dtype]],
        )
        kernel = 2 * 2 * FP32  # reads and writes moments in float32
        if not config.precision_aware:
            scratch = 0 if gradient == FP32 else FP32  # Megatron copies gradients to float32
            return cls(gradient, FP32 + sum(moments), scratch, 2 * FP32 + BF16 + gradient + 2 * scratch + kernel)
        # Of the master weight the half that the weight lacks. Transformer Engine 2.11 copies bfloat16 moments to
        # float32 before its kernel, and back after it.
        remainder, narrow = FP32 - BF16, moments.count(BF16)
        traffic = 2 * (remainder + BF16) + gradient + kernel + narrow * 2 * (FP32 + BF16)
        return cls(gradient, remainder + sum(moments), narrow * FP32, traffic)
