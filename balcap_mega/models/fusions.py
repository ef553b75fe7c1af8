"""What a run asks of Transformer Engine beyond FP8: fused kernels of the decoder, and the precision-aware optimizer."""

from torch import nn

from balcap_mega.config.schema import ModelConfig, OptimizerConfig
from balcap_mega.errors import UserError
from balcap_mega.models.fp8 import TRANSFORMER_ENGINE
from balcap_mega.models.layer_specs import transformer_engine_version


def check_fusions(model: ModelConfig, optimizer: OptimizerConfig) -> None:
    """Refuse what needs Transformer Engine where there is none. Raises UserError, before anything is allocated."""
    asked = {
        "model.apply_rope_fusion": model.apply_rope_fusion,
        "model.gradient_accumulation_fusion": model.gradient_accumulation_fusion,
        "optimizer.precision_aware": optimizer.precision_aware,
    }
    keys = [key for key, wanted in asked.items() if wanted]
    engine, (oldest, too_new) = transformer_engine_version(), TRANSFORMER_ENGINE
    if not keys or (engine is not None and oldest <= engine < too_new):
        return
    off = [f"{key}=false" for key in keys]
    if optimizer.precision_aware:
        off += ["optimizer.exp_avg_dtype=float32", "optimizer.exp_avg_sq_dtype=float32"]
    has = "it is not installed" if engine is None else f"Megatron-Core 0.16.1 does not work with {engine}"
    raise UserError(
        f"{keys[0]}=true needs Transformer Engine, and {has}",
        remedy=f"install transformer-engine>={oldest},<{too_new}, or set {' '.join(off)}",
    )


def fuse_gradient_accumulation(decoder: nn.Module) -> None:
    """Let Transformer Engine's linears add weight gradients to `main_grad` in the GEMMs that make them.

    Megatron's own switch would also want APEX's kernel for the LM head's linear, which never runs here.
    """
    for layer in decoder.modules():
        if hasattr(layer, "fuse_wgrad_accumulation"):
            layer.fuse_wgrad_accumulation = True
            # Asked for the first microbatch it would overwrite what it should add to.
            layer.disable_parameter_transpose_cache = True
