"""vLLM in the trainer's processes: samples captions of a step's prompts, with their logprobs."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from balcap_mega.config.schema import RolloutConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.rollout.generation import ENDS, Generation, OnFinished
from balcap_mega.rollout.requests import RenderedPrompt, RolloutRequest, request_seed
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup
from balcap_mega.rollout.vllm_runtime.engine import (
    build_engine,
    end_engine,
    register_weight_transfer,
    render_prompt,
    scale_logits,
    tokens_of_a_step,
)
from balcap_mega.rollout.vllm_runtime.process import import_vllm, process_state_kept

CPU_KV_CACHE_BYTES = 2**30
"""Key/value cache on a CPU, where `memory_fraction` would be a share of memory that other programs use too."""

WEIGHT_TRANSFER = ("balcap_mega", "balcap_mega.rollout.refit.weight_transfer", "InPlaceWeightTransfer")
"""Name, module and class of our backend of vLLM's weight-transfer interface."""

REFIT_WORKER = "balcap_mega.rollout.vllm_runtime.backend.RefitWorker"


class RolloutEngine:
    """One vLLM engine over `rollout.tensor_parallel` consecutive ranks, in the processes that train.

    With W ranks there are W / tensor_parallel replicas; `balcap_mega.rollout.replicas` shares prompts out and gathers
    rollouts. The ranks of a replica must make the same calls with the same arguments. Construction is a collective.

    sleeps: `sleep` and the two stages of waking do something; on a CPU, where vLLM has no sleep, they never do.

    The policy is softmax(logits / temperature) over the whole vocabulary, and `Rollout.logprobs` are exactly its
    logprobs, at any temperature: what vLLM's logits processor returns is scaled by 1 / temperature in float32, and
    requests sample at temperature 1 with `raw_logprobs`. Media tokens are banned, and `top_p` < 1 truncates, only while
    a token is drawn: either leaves the reported logprobs those of the full distribution, which is what the trainer
    differentiates. With top_p < 1 captions therefore come from the nucleus alone, and that bias stays uncorrected.
    """

    def __init__(
        self,
        model_folder: str | Path,
        config: RolloutConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        sleeps: bool = False,
        pad_to_square: bool = False,
    ):
        self.config = config
        self.device = device
        self.dtype = dtype
        self.seed = seed
        self.sleeps = sleeps and device.type == "cuda"
        self.processor = PromptProcessor(model_folder, pad_to_square=pad_to_square)
        architecture = Architecture.from_folder(model_folder)
        self.vision_data_parallel = architecture.family.vision_data_parallel and config.tensor_parallel > 1
        self._rendering = threading.Lock()
        self._vllm = import_vllm()
        register_weight_transfer(*WEIGHT_TRANSFER)
        with process_state_kept(device):
            arguments = engine_arguments(model_folder, config, device, dtype, seed)
            if self.sleeps:
                arguments["enable_sleep_mode"] = True
            if config.fp8:
                arguments |= fp8_arguments(architecture)
            if self.vision_data_parallel:
                arguments["mm_encoder_tp_mode"] = "data"
            self.llm = build_engine(self._vllm.EngineArgs(**arguments))
        scale_logits(self.llm, 1 / config.temperature)
        self.step_tokens = tokens_of_a_step(self.llm)

    def render(self, record_index: int, record: CaptionRecord) -> RenderedPrompt:
        """Tokens and the processed image of a record's prompt. Any thread may call it, at any time.

        It depends on no weights. All captions of the record share its tensors. Raises UserError as `sample` does.
        """
        with self._rendering, self._must_fit(record_index):
            return render_prompt(self.llm, self.processor.engine_prompt(record))

    def sample(
        self, requests: Iterable[RolloutRequest], *, step: int, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        """`group_size` captions of each request, in the requests' order.

        Drawn from (run seed, step, record index, repeat, rollout number) alone: a resumed run draws the same ones, and
        a record that a step has twice gets other captions the second time. Raises TimeoutError, naming what it waited
        for, after `timeout_seconds`, and RuntimeError where vLLM gives a caption up.
        """
        return self._generate(
            requests,
            lambda request: self._sampling_params(
                temperature=1.0,
                top_p=self.config.top_p,
                seed=request_seed(self.seed, step, request.record_index, request.repeat),
            ),
            self.config.group_size,
            on_finished,
        )

    def greedy(
        self, requests: Iterable[RolloutRequest], *, on_finished: OnFinished | None = None
    ) -> list[RolloutGroup]:
        """The most likely next token each time, for evaluation: groups of one caption.

        It leaves nothing behind in the engine's caches: the next captions come out bit for bit as without it.
        """
        try:
            return self._generate(requests, lambda request: self._sampling_params(temperature=0.0), 1, on_finished)
        finally:
            self.reset_caches()

    def reset_caches(self) -> None:
        """Forget everything computed with the weights so far: key/values, processed images, image embeddings.

        After every change of weights. Left in part, vLLM waits for ever on an image it believes to be encoded. Raises
        RuntimeError while a caption is generated, whose key/values vLLM would keep.
        """
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps the key/values of the old weights: it has a caption still to generate")
        self.llm.reset_mm_cache()
        self.llm.reset_encoder_cache()

    def sleep(self) -> None:
        """Hand the GPU's memory to the trainer: weights to the host (level 1), key/value cache dropped.

        Level 2 would drop the weights too, but with them buffers that no refit brings back. Nothing when asleep.
        """
        if self.sleeps and not self.llm.is_sleeping():
            self.llm.sleep(level=1)

    def wake_weights(self) -> None:
        """The first stage of waking up, before a refit: weights only. Nothing when awake."""
        if self.sleeps and self.llm.is_sleeping():
            self.llm.wake_up(tags=["weights"])

    def wake_cache(self) -> None:
        """The second stage, when the trainer no longer needs that memory: the key/value cache. Nothing when awake."""
        if self.sleeps and self.llm.is_sleeping():
            self.llm.wake_up(tags=["kv_cache"])

    def close(self) -> None:
        """Give up the engine, its memory, and every process group of torch.distributed. A collective."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        end_engine(self.llm)

    def _sampling_params(self, **sampling: Any):
        return self._vllm.SamplingParams(
            max_tokens=self.config.max_tokens,
            logprobs=0,  # of the sampled token
            flat_logprobs=True,
            detokenize=False,  # token after token would take longer than the sampling; see `_rollout`
            logit_bias=dict.fromkeys(self.processor.banned_token_ids, -torch.inf),
            output_kind=self._vllm.sampling_params.RequestOutputKind.CUMULATIVE,
            **sampling,
        )

    def _generate(
        self, requests: Iterable[RolloutRequest], params: Callable, count: int, on_finished: OnFinished | None
    ) -> list[RolloutGroup]:
        """`count` captions of each request, under the vLLM sampling parameters `params(request)`."""

        def submit(name: str, request: RolloutRequest) -> tuple[str, RenderedPrompt]:
            sampling = params(request)
            sampling.n = count
            rendered = request.rendered or self.render(request.record_index, request.record)
            with self._must_fit(request.record_index):
                return self.llm.add_request(name, rendered.inputs, sampling), rendered

        generation = Generation(self.llm, submit, self._rollout, count, self.step_tokens)
        with process_state_kept(self.device):
            return generation.run(requests, self.config.timeout_seconds, on_finished)

    def _rollout(self, completion) -> Rollout:
        token_ids, logprobs = tuple(completion.token_ids), tuple(completion.logprobs.logprobs)
        text = self.processor.decode_caption(token_ids)
        return Rollout(token_ids, logprobs, text, finished=ENDS[completion.finish_reason])

    @contextmanager
    def _must_fit(self, record_index: int) -> Iterator[None]:
        try:
            yield
        except self._vllm.exceptions.VLLMValidationError as error:
            raise UserError(
                f"record {record_index} does not fit rollout.max_model_len={self.config.max_model_len}: {error}",
                remedy="in a new run raise rollout.max_model_len or lower data.max_pixels",
            ) from error


def engine_arguments(
    model_folder: str | Path, config: RolloutConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """vLLM's `EngineArgs` for this run."""
    arguments = {
        "model": str(model_folder),
        "load_format": "safetensors",  # never a pickle, whatever else the folder holds
        "trust_remote_code": False,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.tensor_parallel,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        # A group shares its prompt's tensors anyway, and no weights outlive a step: 4 GiB of old pictures, twice.
        "mm_processor_cache_gb": 0,
        "logprobs_mode": "raw_logprobs",
        "weight_transfer_config": {"backend": WEIGHT_TRANSFER[0]},
        "worker_extension_cls": REFIT_WORKER,
        "stream_interval": config.max_tokens + 1,  # one output as a caption begins and one as it ends
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        arguments["distributed_executor_backend"] = "external_launcher"
    if device.type == "cuda":
        arguments |= {"gpu_memory_utilization": config.memory_fraction}
    else:
        arguments |= {
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            "enforce_eager": True,
            # A prompt in pieces rewinds its seeded generator after all but the last, which CPU generators cannot.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(config.max_model_len, 8192),
            # A group shares whole blocks of its prompt, the rest is computed for every caption: the smallest there is.
            "block_size": 32,
        }
    return arguments


def fp8_arguments(architecture: Architecture) -> dict[str, Any]:
    """Have vLLM quantise the decoder's linears as it loads them, but for those that `model.fp8` leaves in bfloat16 too.

    A scale for each output channel of a weight and, as it comes, for each token.
    """
    ends = "|".join(str(layer) for layer in sorted({0, architecture.num_layers - 1}))
    unquantised = [*architecture.family.vision_modules, rf"layers\.({ends})"]
    return {
        "quantization": "fp8_per_channel",
        "quantization_config": {"ignore": [rf"re:(.*\.)?{name}\..*" for name in unquantised]},
    }
