"""Prefix once and captions behind it, against a copy of the prefix for every caption: the same loss and gradients.

Everything but the packing is the same on both sides: weights, images, rollouts, loss, the Megatron schedule. The vision
tower is trained along.
"""

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from PIL import Image

from balcap_mega.algorithm.batch import TokenBatch
from balcap_mega.algorithm.lm_head import HeadShard, fused_policy_loss, token_logprobs
from balcap_mega.algorithm.policy_loss import policy_loss
from balcap_mega.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.policy import build_policy
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.packing.assign import assign_rows
from balcap_mega.packing.build import PackingGroup, build_row
from balcap_mega.parallel.gradients import wrap_ddp
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel, process_grid
from balcap_mega.parallel.platform import Platform
from balcap_mega.parallel.schedule import run_schedule
from tests.support.distributed import launch
from tests.support.policy_cases import load_reference, load_state

ROW_TOKENS = 192
ALGORITHM = AlgorithmConfig(kl_weight=0.05, dual_clip=3.0)
# Image size of each prompt and its captions' lengths; None is the length that fills a row to its last token.
GROUPS = (((84, 84), (1, 1, 9)), ((56, 112), (2, 70, 1)), ((112, 84), (None, 5)), ((28, 56), (6,)), ((84, 56), (1,)))


def make_groups(folder) -> tuple[list[PackingGroup], list]:
    """The step's groups and each one's image, for the policy in `folder`."""
    random = np.random.default_rng(0)
    processor = PromptProcessor(folder)
    groups, images, sequences = [], [], 0
    for number, (size, lengths) in enumerate(GROUPS):
        picture = Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8))
        prompt = processor(CaptionRecord(id=str(number), image=picture, prompt="Describe the shapes.", reference=None))
        fills = ROW_TOKENS - len(prompt.prompt_token_ids) + 1
        captions = [random.integers(10, 200, fills if length is None else length).tolist() for length in lengths]
        groups.append(PackingGroup(prompt.prompt_token_ids, prompt.position_ids, captions, sequences))
        images.append(prompt.vision)
        sequences += len(captions)
    return groups, images


def token_batch(row) -> TokenBatch:
    """Advantages and logprobs that depend on a token's rollout and place alone, not on the row it stands in."""
    place = (row.sequence_ids * 1000 + row.token_index).double()
    old = (-4 - torch.sin(place)).float()
    lengths = torch.bincount(row.sequence_ids, minlength=1)
    return TokenBatch(
        targets=row.targets,
        sequence_ids=row.sequence_ids,
        token_index=row.token_index,
        advantages=torch.cos(torch.arange(row.sequence_ids.max() + 1) * 2.0),
        old_logprobs=old,
        rollout_logprobs=old + 0.1 * torch.cos(place).float(),
        reference_logprobs=old + 0.2 * torch.sin(3 * place).float(),
        sequence_lengths=lengths[row.sequence_ids].float(),
    )


def step(model, architecture, groups, images, *, shared_prefix: bool, fused: bool):
    """(Σ loss, {(sequence, place): logprob}, main gradients) of one step over this rank's rows, and its token count."""
    layout = process_grid()
    pad_to = 2 * layout.tensor_size
    assignment = assign_rows(
        [group.lengths for group in groups],
        row_tokens=ROW_TOKENS,
        hidden_size=architecture.hidden_size,
        data_size=layout.data_size,
        pad_to=pad_to,
        shared_prefix=shared_prefix,
    )
    rows = [build_row(row, groups, pad_to=pad_to) for row in assignment.rows[layout.data_rank]]
    logprobs, losses = {}, []

    def forward(stage, row):
        def objective(hidden, weight):
            tokens, group = token_batch(row), parallel_state.get_tensor_model_parallel_group()
            head = HeadShard(weight, architecture.vocab_size, group)
            current, entropy = token_logprobs(hidden, row.targets, head)
            logprobs.update(zip(zip(row.sequence_ids.tolist(), row.token_index.tolist()), current.detach().tolist()))
            if fused:
                loss = fused_policy_loss(hidden, tokens, head, ALGORITHM)
            else:
                loss = policy_loss(current, tokens, ALGORITHM, entropy=entropy)
            losses.append(float(loss.loss_sum.detach()))
            return loss

        output = stage(
            row.tokens[None],
            row.position_ids[:, None],
            row.segments,
            row.hidden_rows,
            objective,
            [images[prompt] for prompt in row.images],
        )
        return output, lambda loss: (loss.loss_sum, loss.normaliser.int(), None)

    model.zero_grad_buffer()
    run_schedule(model, rows, forward)
    gradients = {name: p.main_grad.clone() for name, p in model.module.named_parameters() if p.requires_grad}
    total = torch.tensor(sum(losses), dtype=torch.float64)
    torch.distributed.all_reduce(total)  # tensor-parallel ranks count alike in all that is compared
    return float(total), logprobs, gradients, assignment.tokens


def largest_difference(name: str, actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative to the largest entry. A key's bias shifts all scores of a query alike, so the gradient of CLIP's is 0
    but for rounding: it is measured by the query's."""
    scale = expected[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
    return float((actual[name] - expected[name]).abs().max() / scale)


def make_policy(folder, parallel: ParallelConfig, *, freeze_vision: bool):
    platform = Platform.resolve("cpu")
    initialize_parallel(parallel, platform)
    architecture = Architecture.from_folder(folder)
    config = ModelConfig(path=str(folder), dtype="float32", freeze_vision=freeze_vision)
    policy = build_policy(architecture, config, parallel, platform)
    load_state(policy, load_reference(folder).state_dict())
    return platform, architecture, policy


def compare(folder, parallel: ParallelConfig) -> dict[str, float]:
    platform, architecture, policy = make_policy(folder, parallel, freeze_vision=False)
    groups, images = make_groups(folder)
    differences = {}
    with platform.megatron():
        model = wrap_ddp(policy, parallel)
        loss, logprobs, gradients, tokens = step(model, architecture, groups, images, shared_prefix=False, fused=False)
        for fused in (False, True):
            shared = step(model, architecture, groups, images, shared_prefix=True, fused=fused)
            head = "fused" if fused else "plain"
            differences[f"{head}: loss"] = abs(shared[0] - loss) / abs(loss)
            for name in gradients:
                differences[f"{head}: {name}"] = largest_difference(name, shared[2], gradients)
            assert shared[3] < tokens, "the shared rows are not shorter"
    if parallel.tensor * parallel.pipeline == torch.distributed.get_world_size() and process_grid().is_last_stage:
        assert shared[1].keys() == logprobs.keys()  # both packings stand on this rank, token for token
        differences["logprobs"] = max(abs(shared[1][token] - logprobs[token]) for token in logprobs)
    destroy_parallel()
    return differences


def images_encoded(folder) -> list[int]:
    """How many images this rank's frozen tower encodes in each forward, over two passes through all rows."""
    parallel = ParallelConfig(tensor=2, distributed_optimizer=False)
    platform, architecture, policy = make_policy(folder, parallel, freeze_vision=True)
    groups, images = make_groups(folder)
    counts = []
    policy.vision.register_forward_pre_hook(lambda tower, arguments: counts.append(len(arguments[0])))
    with platform.megatron():
        model = wrap_ddp(policy, parallel)
        for shared_prefix in (True, False):
            step(model, architecture, groups, images, shared_prefix=shared_prefix, fused=True)
    destroy_parallel()
    return counts


LAYOUTS = {
    "one model per rank": {},
    "tensor parallel": {"tensor": 2},
    "sequence parallel": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
}


def compare_all(folder) -> tuple[dict[str, dict[str, float]], list[int]]:
    layouts = {name: ParallelConfig(**layout, distributed_optimizer=False) for name, layout in LAYOUTS.items()}
    return {name: compare(folder, layout) for name, layout in layouts.items()}, images_encoded(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefix_changes_nothing(tiny_checkpoint, family):
    ranks = launch(2, compare_all, tiny_checkpoint(family))
    assert sum(sum(counts) for _, counts in ranks) == len(GROUPS), (
        "a frozen tower must encode each image once, on one rank"
    )
    for rank, (layouts, _) in enumerate(ranks):
        for layout, differences in layouts.items():
            for quantity, difference in differences.items():
                assert difference < 1e-5, f"rank {rank}, {layout}: {quantity} differs by {difference:.1e}"
