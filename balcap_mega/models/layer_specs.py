"""Layer specs of the language model: Megatron's own linears, or Transformer Engine's for bfloat16 on a GPU that has it.

Both compute attention with `SegmentAttention`, which reads the packed row's segments where Megatron passes a mask.
"""

import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from packaging.version import Version
from torch import Tensor

from balcap_mega.errors import UserError
from balcap_mega.models.attention import SegmentAttention
from balcap_mega.models.families.interface import Decoder


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm with Megatron's constructor.

    Under sequence parallelism each tensor-parallel rank normalises its own tokens, so its weight's gradient is a
    partial sum; the weight's `sequence_parallel` mark makes `finalize_model_grads` add them up.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue] (Megatron reads it)


class DeepstackLayer(TransformerLayer):
    """A decoder layer that adds the first of the deepstack features to its output and hands the others on.

    They come as Megatron's `context`, [layers, S, 1, H] like the hidden states, or None when none are left.
    """

    def forward(self, *arguments, context: Tensor | None = None, **options) -> tuple[Tensor, Tensor | None]:
        hidden: Tensor = super().forward(*arguments, **options)[0]
        if context is None:
            return hidden, None
        return hidden + context[0], context[1:] if len(context) > 1 else None


def block_spec(
    config: TransformerConfig, decoder: Decoder, *, transformer_engine: bool, attention: str
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage and the final norm; `attention` names a backend of it."""
    layer, norm = (_transformer_engine_layer if transformer_engine else _local_layer)(decoder, attention)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm)


def _local_layer(decoder: Decoder, attention: str) -> tuple[ModuleSpec, type]:
    linears = (ColumnParallelLinear, ColumnParallelLinear, RowParallelLinear)
    return _layer(decoder, attention, *linears, norm=RMSNorm, separate_norms=True)


def transformer_engine_version() -> Version | None:
    """None where it is not installed: then there is no FP8, and norms are not fused into linears."""
    try:
        return Version(metadata.version("transformer_engine_torch"))
    except metadata.PackageNotFoundError:
        return None


def _transformer_engine_layer(decoder: Decoder, attention: str) -> tuple[ModuleSpec, type]:
    """Norms are fused into the linear that follows them; FP8 is switched on by the config around each layer."""
    try:
        # Where it does not load, Megatron would go on with a mock of it.
        import transformer_engine.pytorch  # noqa: F401 # pyright: ignore[reportMissingImports] (on GPU hosts)
    except (ImportError, OSError) as error:
        raise UserError(
            f"Transformer Engine is installed, but does not load: {error}", remedy="bash launch/install.sh --cuda"
        ) from error
    _show_cuda_headers()
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    class ColumnLinear(_NoExtraState, TELayerNormColumnParallelLinear):
        pass

    class RowLinear(_NoExtraState, TERowParallelLinear):
        pass

    return _layer(decoder, attention, ColumnLinear, ColumnLinear, RowLinear, norm=RMSNorm, separate_norms=False)


def _show_cuda_headers() -> None:
    """Transformer Engine compiles FP8 kernels as it runs, and finds a CUDA toolkit, but not the wheels of CUDA 13."""
    nvidia = find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else ():
        headers = Path(folder, "cu13", "include")
        if (headers / "cuda_runtime.h").is_file():
            os.environ.setdefault("NVTE_CUDA_INCLUDE_DIR", str(headers))


class _NoExtraState:
    """Keeps Transformer Engine's pickled FP8 state out of checkpoints, which are read without unpickling.

    Only delayed scaling has any: after a resume it measures its scales anew.
    """

    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state


def _layer(
    decoder: Decoder, backend: str, qkv: type, fc1: type, row: type, *, norm: type, separate_norms: bool
) -> tuple[ModuleSpec, type]:
    layer_norm = norm if separate_norms else IdentityOp
    head_norm = norm if decoder.qk_norm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=qkv,
            core_attention=ModuleSpec(module=SegmentAttention, params={"backend": backend}),
            linear_proj=row,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    layer = ModuleSpec(
        module=DeepstackLayer if decoder.deepstack else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=layer_norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=layer_norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return layer, norm
