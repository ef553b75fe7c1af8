"""The Megatron policy against transformers' own model and torch's AdamW, at every layout, in float32."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from balcap_mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.policy import VisionLanguagePolicy, build_policy
from balcap_mega.parallel.gradients import build_optimizer, wrap_ddp
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel, process_grid
from balcap_mega.parallel.platform import Platform
from balcap_mega.parallel.schedule import run_schedule
from tests.support.distributed import launch
from tests.support.policy_cases import (
    Case,
    expected_shard,
    load_reference,
    load_state,
    make_case,
    reference_logits,
    reference_loss,
)

# eps is far above float32 noise in the gradients: Adam would otherwise turn the noise of entries whose true gradient is
# zero (such as the key biases of CLIP) into steps of full size, in transformers' model as well as in ours.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.01, betas=(0.9, 0.95), eps=1e-5, max_grad_norm=1.0)
STEPS = 3


def whole_logits(vocab_size: int):
    def objective(hidden, weight):
        return gather_from_tensor_model_parallel_region(hidden @ weight.t())[:, :vocab_size]

    return objective


def run_rows(policy, model, case: Case, *, forward_only: bool):
    """This rank's rows through the schedule: [(sequence ids, logits, loss sum)] on the last stage."""
    layout = process_grid()
    vocab_size = policy.architecture.vocab_size

    def forward(stage, row):
        logits = stage(
            row.tokens[None],
            row.position_ids[:, None],
            row.segments,
            row.hidden_rows,
            whole_logits(vocab_size),
            case.images_of(row),
        )

        def loss(logits):
            total = torch.nn.functional.cross_entropy(logits, row.targets, reduction="sum")
            count = torch.tensor(len(row.targets), dtype=torch.int)
            return total, count, (row, logits.detach(), float(total))

        return logits, loss

    rows = case.rows[layout.data_rank :: layout.data_size]
    return run_schedule(model, rows, forward, forward_only=forward_only)


def largest_logit_difference(results, reference: dict[int, torch.Tensor]) -> float:
    largest = 0.0
    for row, logits, _ in results:
        for sequence in row.sequence_ids.unique().tolist():
            difference = logits[row.sequence_ids == sequence] - reference[sequence]
            largest = max(largest, float(difference.abs().max()))
    return largest


def relative(actual: torch.Tensor, expected: torch.Tensor, floor: float = 1e-12) -> float:
    """Largest difference over the largest expected entry, or over `floor` where all of them are smaller."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(floor))


def train_reference(folder, case: Case, freeze_vision: bool):
    """Logits, gradients, losses, norms and weights of transformers' model under torch's AdamW."""
    model = load_reference(folder)
    unused = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.")  # behind LLaVA's feature layer
    for name, parameter in model.named_parameters():
        in_vision = "visual." in name or "vision_tower." in name or "multi_modal_projector." in name
        parameter.requires_grad_(not (freeze_vision and in_vision) and not any(part in name for part in unused))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    vectors = [parameter for parameter in trained.values() if parameter.ndim == 1]
    matrices = [parameter for parameter in trained.values() if parameter.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay,
    )  # fmt: skip
    logits = {sequence: value.detach() for sequence, value, _ in reference_logits(model, case)}
    gradients, losses, norms = None, [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = reference_loss(model, case)
        loss.backward()
        if gradients is None:
            gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
        losses.append(float(loss))
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER.max_grad_norm)))
        optimizer.step()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    return {
        "logits": logits,
        "gradients": gradients,
        "losses": losses,
        "norms": norms,
        "before": before,
        "after": after,
    }


def compare(folder, case: Case, reference: dict, parallel: ParallelConfig, **model_options) -> dict[str, float]:
    """Largest differences of this rank's part of the policy from the reference, over three updates."""
    platform = Platform.resolve("cpu")
    initialize_parallel(parallel, platform)
    config = ModelConfig(path=str(folder), dtype="float32", **model_options)
    policy: VisionLanguagePolicy = build_policy(Architecture.from_folder(folder), config, parallel, platform)
    load_state(policy, reference["before"])
    differences = {}
    with platform.megatron():
        results = run_rows(policy, policy, case, forward_only=True)
        if process_grid().is_last_stage:
            differences["logits"] = largest_logit_difference(results, reference["logits"])
        model = wrap_ddp(policy, parallel)
        optimizer = build_optimizer(model, OPTIMIZER, parallel)
        losses, norms = [], []
        for step in range(STEPS):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            results = run_rows(policy, model, case, forward_only=False)
            losses.append(sum(total for _, _, total in results))
            if step == 0 and not parallel.distributed_optimizer:  # else a rank holds only its shard of the sum
                gradients = reference["gradients"]
                tied = {"lm_head.weight": gradients["model.language_model.embed_tokens.weight"]}
                differences["gradients"] = max(
                    relative(parameter.main_grad, expected_shard(policy, name, parameter, tied | gradients), floor=1e-6)
                    for name, parameter in policy.named_parameters()
                    if parameter.requires_grad
                )
            updated, norm, _ = optimizer.step()
            assert updated
            norms.append(norm)
        differences["weights"] = max(
            relative(parameter, expected_shard(policy, name, parameter, reference["after"]))
            for name, parameter in policy.named_parameters()
        )
    layout = process_grid()
    if layout.is_last_stage:
        tokens = sum(len(caption) for group in case.groups for caption in group.captions)
        sums = torch.tensor(losses, dtype=torch.float64) / tokens
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        differences["loss"] = relative(sums, torch.tensor(reference["losses"], dtype=torch.float64))
    differences["norm"] = relative(torch.tensor(norms), torch.tensor(reference["norms"]))
    destroy_parallel()
    return differences


LIMITS = {"logits": 1e-4, "gradients": 1e-4, "weights": 1e-5, "loss": 1e-5, "norm": 1e-5}


@dataclass(frozen=True)
class Job:
    """One model on one rank's side: its folder, the pickled (case, reference), and the layouts to build it at."""

    folder: Path
    expectations: Path
    layouts: tuple[ParallelConfig, ...]
    model_options: dict


def run_jobs(jobs: list[Job]) -> list[tuple[str, dict[str, float]]]:
    results = []
    for job in jobs:
        case, reference = torch.load(job.expectations, weights_only=False)
        for parallel in job.layouts:
            differences = compare(job.folder, case, reference, parallel, **job.model_options)
            results.append((f"{job.folder.name} {job.model_options} {parallel}", differences))
    return results


def layout(tensor: int, pipeline: int, *, sequence: bool = False, distributed_optimizer: bool = False):
    return ParallelConfig(
        tensor=tensor, pipeline=pipeline, sequence=sequence, distributed_optimizer=distributed_optimizer
    )


@pytest.fixture(scope="module")
def job(tiny_checkpoint, tmp_path_factory):
    """`job(family, *layouts, freeze_vision=..., recompute=..., **checkpoint options)`."""
    expectations = {}

    def make(family, *layouts, freeze_vision=False, recompute="none", **checkpoint):
        folder = tiny_checkpoint(family, **checkpoint)
        if (folder, freeze_vision) not in expectations:
            case = make_case(folder)
            path = tmp_path_factory.mktemp("expectations") / "case.pt"
            torch.save((case, train_reference(folder, case, freeze_vision)), path)
            expectations[folder, freeze_vision] = path
        options = {"freeze_vision": freeze_vision, "recompute": recompute}
        return Job(folder, expectations[folder, freeze_vision], layouts, options)

    return make


def check(world_size: int, *jobs: Job) -> None:
    for rank, results in enumerate(launch(world_size, run_jobs, list(jobs))):
        for what, differences in results:
            for quantity, difference in differences.items():
                message = f"rank {rank} of {what}: {quantity} differs by {difference:.1e}"
                assert difference <= LIMITS[quantity], message


# Fewer key/value heads (2) than TP 4, a vocabulary TP does not divide, tied embeddings, stages of 2 and 3 layers.
ODD_SHAPES = dict(text_config={"num_hidden_layers": 5, "vocab_size": 509}, tie_word_embeddings=True)


def test_one_rank(job):
    check(1, *(job(family, layout(1, 1), layout(1, 1, distributed_optimizer=True)) for family in FAMILIES))


def test_two_ranks(job):
    layouts = (layout(1, 1, distributed_optimizer=True), layout(2, 1), layout(2, 1, sequence=True), layout(1, 2))
    recomputed = [
        job(family, layout(2, 1, sequence=True), recompute=kind)
        for family, kind in (("qwen2_5_vl", "selective"), ("qwen2_5_vl", "full"), ("qwen3_vl", "full"))
    ]
    check(2, *(job(family, *layouts) for family in FAMILIES), *recomputed)


def test_four_ranks(job):
    layouts = (
        layout(1, 2, distributed_optimizer=True),
        layout(2, 1, sequence=True, distributed_optimizer=True),
        layout(2, 2),
        layout(2, 2, sequence=True, distributed_optimizer=True),
    )
    check(4, *(job(family, *layouts) for family in FAMILIES))


def test_odd_shapes_on_four_ranks(job):
    layouts = (
        layout(1, 2),
        layout(2, 2, sequence=True, distributed_optimizer=True),
        layout(4, 1, sequence=True),
        layout(4, 1, distributed_optimizer=True),
    )
    overlapped = ParallelConfig(pipeline=2, overlap_grad_reduce=True, bucket_size=5000)
    check(
        4,
        *(job(family, *layouts, freeze_vision=True, **ODD_SHAPES) for family in FAMILIES),
        job("qwen2_5_vl", overlapped, freeze_vision=True, **ODD_SHAPES),
    )
