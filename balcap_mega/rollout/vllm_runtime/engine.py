"""vLLM's engine in the trainer's process: how it is built and ended, how prompts are made for it in advance, and how it
comes to report tempered logprobs.
"""

from typing import Any

import torch

from balcap_mega.rollout.requests import RenderedPrompt


def register_weight_transfer(name: str, module: str, engine_class: str) -> None:
    """Let `weight_transfer_config` name our backend. vLLM has no way to ask whether that was done before."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, module, engine_class)


def build_engine(arguments):
    """An engine with vLLM's defaults for offline use: on an H100 1,024 captions at once, where a bare one takes 128.

    The trainer owns torch.distributed: an engine that is garbage-collected must not shut it down.
    """
    from vllm import LLMEngine
    from vllm.usage.usage_lib import UsageContext

    engine = LLMEngine.from_engine_args(arguments, UsageContext.LLM_CLASS)
    # vLLM 0.24 has no finalizer.
    if finalizer := getattr(engine.engine_core, "_finalizer", None):
        finalizer.detach()
    return engine


def end_engine(engine) -> None:
    """vLLM's own end, for which `build_engine` left it no occasion. It takes torch.distributed with it."""
    engine.engine_core.engine_core.shutdown()


def render_prompt(engine, prompt: dict[str, Any]) -> RenderedPrompt:
    """What `engine.add_request` makes of a prompt first, and takes in its place too.

    Not for two threads at a time: each call sets up the tokenizer.
    """
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    [rendered] = engine.renderer.render_cmpl([parse_model_prompt(engine.model_config, prompt)])
    items = [item for items in rendered["mm_kwargs"].values() for item in items]
    nbytes = sum(value.nbytes for item in items for value in item.get_data().values())
    return RenderedPrompt(rendered, len(rendered["prompt_token_ids"]), nbytes)


def tokens_of_a_step(engine) -> int:
    """How many tokens the engine computes in one step, at most."""
    return engine.vllm_config.scheduler_config.max_num_batched_tokens


def scale_logits(engine, scale: float) -> None:
    """Have the model multiply its logits by `scale`, so that raw logprobs are those of the tempered distribution.

    In float32, as the trainer does. vLLM's own `scale` rounds each product to the dtype of the weights: in bfloat16 a
    logit of 30 by up to 0.06, and its logprob with it.
    """
    if scale == 1:
        return

    def scaled(processor: torch.nn.Module, arguments: tuple, logits: torch.Tensor | None) -> torch.Tensor | None:
        return None if logits is None else logits.float().mul_(scale)  # None: as it was

    def register(model: Any) -> None:  # one of vLLM's multimodal models
        model.get_language_model().logits_processor.register_forward_hook(scaled)

    engine.apply_model(register)
