"""Core attention of the policy's decoder: every packed row's prefixes once, shared by their captions.

Drop-in for Megatron-Core 0.16's `DotProductAttention`; `attention_mask` carries the row's `segments` instead of a mask.
"""

import math

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from balcap_mega.models.attention_backends import find_backend
from balcap_mega.models.attention_backends.pattern import attention_pattern


class SegmentAttention(MegatronModule):
    """Attention of a packed row: each segment to its prefix in full and to itself causally. Has no parameters.

    Work and memory are those of this pattern: no mask is built, and neither prefixes nor key heads are repeated.
    Tokens outside all segments (padding) yield zero and receive zero gradient.

    backend: the kernels of 16-bit numbers on CUDA, as `model.attention` names them
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        backend: str,
    ):
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout or config.context_parallel_size > 1:
            raise ValueError("SegmentAttention needs attention_dropout=0 and context_parallel_size=1")
        self.backend = backend
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: None = None,
    ) -> Tensor:
        """Attend.

        query:          [S, 1, heads / TP, d]
        key, value:     [S, 1, key heads / TP, d]
        attention_mask: the row's `segments`, int32 [M, 4], on the host (see `PackedRow`)

        Returns [S, 1, heads / TP · d].
        """
        backend = find_backend(self._backend_for(query))
        output = backend(
            query.squeeze(1), key.squeeze(1), value.squeeze(1), attention_pattern(attention_mask), self.softmax_scale
        )
        return output.flatten(1).unsqueeze(1)

    def _backend_for(self, query: Tensor) -> str:
        """Only flex computes in float32 on a GPU."""
        if not query.is_cuda:
            return "cpu"
        return self.backend if query.element_size() == 2 else "flex"
