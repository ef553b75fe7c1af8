"""Float32 master weights, stored as bfloat16 weights and the 16 bits that these lack.

Transformer Engine's Adam stores them so when it is precision-aware. The bfloat16 is the float32 rounded to nearest,
ties away from zero. The int16 is the lower half of the float32; where it is negative, the upper half was rounded up.
"""

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def joined(weights: Tensor, remainders: Tensor) -> Tensor:
    """The float32 of each bfloat16 weight and int16 remainder."""
    upper = weights.view(torch.int16).int() - (remainders < 0).int()
    return ((upper << 16) | (remainders.int() & 0xFFFF)).view(torch.float32)


def split(masters: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 weights as bfloat16 weights and int16 remainders; the inverse of `joined`, bit for bit."""
    bits = masters.view(torch.int32)
    remainders = (bits << 16 >> 16).to(torch.int16)
    upper = (bits >> 16).to(torch.int16) + (remainders < 0).to(torch.int16)
    return upper.view(torch.bfloat16), remainders


class PrecisionAwareOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer; its checkpoints hold whole float32 weights.

    Without this, Megatron-Core 0.16 saves the int16 remainders as if they were weights, and fails to load them, since
    its formats make them float32 and Transformer Engine insists on int16.
    """

    def _get_main_param_and_optimizer_states(self, model_param):
        tensors = super()._get_main_param_and_optimizer_states(model_param)
        return tensors | {"param": joined(self._shard(model_param).detach(), tensors["param"])}

    def _set_main_param_and_optimizer_states(self, model_param, tensors):
        weights, remainders = split(tensors["param"])
        self._shard(model_param).data.copy_(weights)
        super()._set_main_param_and_optimizer_states(model_param, tensors | {"param": remainders})

    def _shard(self, model_param) -> Tensor:
        """This rank's part of the bfloat16 weight, flat; it shares the weight's memory."""
        group, order = self.model_param_group_index_map[model_param]
        return self.optimizer.param_groups[group]["params"][order]
