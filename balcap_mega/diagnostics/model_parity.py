"""Compares the policy on Megatron, at one layout, with transformers' forward pass on the same checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from balcap_mega.config.schema import ModelConfig, ParallelConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.transfer import import_checkpoint
from balcap_mega.models.policy import VisionLanguagePolicy, build_policy
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.models.vision import VisionInputs
from balcap_mega.packing.assign import Piece
from balcap_mega.packing.build import PackingGroup, build_row
from balcap_mega.packing.rows import PackedRow
from balcap_mega.parallel.groups import initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.parallel.schedule import Loss, run_schedule

IMAGE_SIZES = ((224, 336), (448, 252))
CAPTIONS = ("A red circle is to the left of a blue square.", "Two people walk along a river at dusk.")
ROW_MULTIPLE = 128  # per tensor-parallel rank: what fp8 layers ask for


@dataclass(frozen=True)
class ModelParity:
    """Largest absolute differences over `tokens` response tokens, of all logits and of the tokens' own logprobs."""

    tokens: int
    logits: float
    logprobs: float

    def within(self, tolerance: float) -> bool:
        return self.logprobs <= tolerance

    def report(self, tolerance: float) -> str:
        verdict = "agrees" if self.within(tolerance) else "DIFFERS"
        return (
            f"largest difference from transformers over {self.tokens} tokens: logits {self.logits:.2e}, "
            f"logprobs {self.logprobs:.2e} (tolerance {tolerance:.0e}): {verdict}"
        )


@dataclass(frozen=True)
class _Batch:
    """Prompts with two captions each, as one packed row; `images[p]` is None for a prompt of text alone."""

    groups: list[PackingGroup]
    images: list[VisionInputs | None]
    row: PackedRow


def compare_with_transformers(model: ModelConfig, parallel: ParallelConfig) -> ModelParity:
    """Build the policy of `model.path` at this layout and compare. A collective; every rank gets the result.

    The last stage's first rank then loads the whole model into transformers, on its own device, the policy being gone.
    """
    platform = Platform.resolve(parallel.device)
    architecture = Architecture.from_folder(model.path)
    architecture.check_layout(parallel)
    grid = initialize_parallel(parallel, platform)
    batch = _make_batch(PromptProcessor(model.path), pad_to=ROW_MULTIPLE * grid.tensor_size)
    policy = build_policy(architecture, model, parallel, platform)
    import_checkpoint(model.path, policy)
    logits = _policy_logits(policy, batch, platform)
    del policy
    differences = torch.zeros(2, device=platform.device)
    if grid.is_last_stage and grid.tensor_rank == grid.data_rank == 0:
        differences += _differences(logits, model, batch, platform).to(platform.device)
    torch.distributed.all_reduce(differences)
    return ModelParity(len(batch.row.targets), *differences.tolist())


def _make_batch(processor: PromptProcessor, pad_to: int) -> _Batch:
    random = np.random.default_rng(0)
    captions = [processor.encode_caption(caption) for caption in CAPTIONS]
    groups, images = [], []
    for size in IMAGE_SIZES:
        picture = Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8))
        prompt = processor(CaptionRecord(id=str(size), image=picture, prompt="Describe the image.", reference=""))
        groups.append(PackingGroup(prompt.prompt_token_ids, prompt.position_ids, captions, len(groups) * len(captions)))
        images.append(prompt.vision)
    text = processor.encode_caption("Write one sentence.")[:-1]
    positions = processor.position_ids(torch.tensor(text), None)
    groups.append(PackingGroup(text, positions, captions, len(groups) * len(captions)))
    images.append(None)
    every_caption = tuple(range(len(captions)))
    return _Batch(
        groups, images, build_row([Piece(index, every_caption) for index in range(len(groups))], groups, pad_to=pad_to)
    )


def _policy_logits(policy: VisionLanguagePolicy, batch: _Batch, platform: Platform) -> Tensor | None:
    """[R, V] float32 logits of the row's response tokens on the last stage, None elsewhere."""
    vocab_size, device = policy.architecture.vocab_size, platform.device
    images = [image for image in batch.images if image is not None]

    def objective(hidden: Tensor, weight: Tensor) -> Tensor:
        return gather_from_tensor_model_parallel_region(hidden @ weight.t())[:, :vocab_size]

    def keep(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logits.sum(), torch.tensor(1, dtype=torch.int), logits.float()

    def forward(stage: VisionLanguagePolicy, row: PackedRow) -> tuple[Tensor, Loss]:
        output = stage(
            row.tokens[None].to(device),
            row.position_ids[:, None].to(device),
            row.segments,
            row.hidden_rows.to(device),
            objective,
            images,
        )
        return output, keep

    policy.eval()
    results = run_schedule(policy, [batch.row], forward, forward_only=True)
    return results[0] if results else None


@torch.no_grad()
def _differences(logits: Tensor, model: ModelConfig, batch: _Batch, platform: Platform) -> Tensor:
    """[2]: the largest differences of logits and of the response tokens' logprobs."""
    reference = torch.cat(list(_reference_logits(model, batch, platform)))
    targets = batch.row.targets.to(logits.device)[:, None]
    logprobs, expected = (each.log_softmax(-1).gather(1, targets) for each in (logits, reference))
    return torch.stack([(logits - reference).abs().max(), (logprobs - expected).abs().max()])


def _reference_logits(model: ModelConfig, batch: _Batch, platform: Platform) -> Iterator[Tensor]:
    """transformers' logits [tokens, V] of each caption, in the row's order, computed without packing one by one."""
    reference = AutoModelForImageTextToText.from_pretrained(
        model.path,
        dtype=platform.dtype(model.dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    ).to(platform.device)
    image_token_id = reference.config.image_token_id
    for group, image in zip(batch.groups, batch.images, strict=True):
        for caption in group.captions:
            tokens = torch.tensor([*group.prompt_token_ids, *caption], device=platform.device)[None]
            inputs = {"input_ids": tokens}
            if image is not None:
                inputs["pixel_values"] = image.pixel_values.to(platform.device)
                if image.image_grid_thw is not None:
                    inputs["image_grid_thw"] = image.image_grid_thw.to(platform.device)
                    inputs["mm_token_type_ids"] = (tokens == image_token_id).int()
            yield reference(**inputs).logits[0, -len(caption) - 1 : -1].float()
