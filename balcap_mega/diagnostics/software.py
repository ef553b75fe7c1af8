"""Imports the compiled packages that a run needs: an installed package may still fail to load."""

import importlib

from balcap_mega.config.schema import RunConfig
from balcap_mega.diagnostics.finding import Finding, check, fail, ok, warn
from balcap_mega.models.fusions import check_fusions
from balcap_mega.models.layer_specs import transformer_engine_version
from balcap_mega.parallel.platform import Platform
from balcap_mega.rollout.vllm_runtime.process import import_vllm

INSTALL = "bash launch/install.sh --cuda"
ImportFailure = ImportError | OSError  # the second: a shared library that is not there


@check("vLLM")
def check_vllm(platform: Platform) -> Finding:
    """Does it load, and is it built for the run's device?"""
    vllm = import_vllm()
    from vllm.platforms import current_platform

    kind, wanted = current_platform.device_type, platform.device.type
    if kind != wanted:
        remedy = INSTALL if wanted == "cuda" else "bash launch/install.sh"
        return fail(f"{vllm.__version__} runs on {kind or 'nothing'}, the run on {wanted}", remedy)
    return ok(f"{vllm.__version__} on {kind}")


@check("Transformer Engine")
def check_transformer_engine(config: RunConfig | None, platform: Platform) -> Finding:
    """Where it is installed, the decoder of a bfloat16 policy on GPUs is built of it; on a CPU it is not used."""
    if not platform.is_cuda:
        return ok("not used on a CPU")
    if config is not None:
        check_fusions(config.model, config.optimizer)
    if transformer_engine_version() is None:
        fp8 = config is not None and config.model.fp8 != "none"
        return (fail if fp8 else warn)("not installed: no FP8, and layers are Megatron's own", INSTALL)
    if error := _import_error("transformer_engine.pytorch"):
        return fail(f"no policy can be built on GPUs: {error}", INSTALL)
    return ok("loads")


@check("flash-attn")
def check_flash_attention(platform: Platform) -> Finding:
    """Optional: attention over packed rows runs PyTorch's own flash kernels, and a newer one where it is installed."""
    if not platform.is_cuda:
        return ok("not used on a CPU")
    error = _import_error("flash_attn")
    if isinstance(error, ModuleNotFoundError):
        return ok("not installed: attention takes PyTorch's own flash kernels")
    if error:
        return warn(f"does not load: {error}", "pip uninstall flash-attn, or build it again")
    return ok("loads")


@check("DALI")
def check_dali(config: RunConfig | None) -> Finding:
    """Decodes images where data.image_backend=dali."""
    wanted = config is not None and config.data.image_backend == "dali"
    if error := _import_error("nvidia.dali"):
        return fail(f"does not load: {error}", "set data.image_backend=pil") if wanted else ok(f"not there: {error}")
    return ok("loads" if wanted else "loads; data.image_backend=pil does without")


def _import_error(module: str) -> ImportFailure | None:
    try:
        importlib.import_module(module)
    except ImportFailure as error:
        return error
    return None
