"""On a GPU: engine and learner take turns in its memory, in whatever order a run calls them."""

import pytest
import torch

from balcap_mega.config.schema import RunConfig
from balcap_mega.data.sources import build_datasets
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.training.build import build_trainer
from balcap_mega.training.folder import RunFolder
from balcap_mega.training.guard.signals import StopRequest
from balcap_mega.training.prompts import Prompts

WIDE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]},
}  # fmt: skip
ENGINE_SHARE = 0.25
ACTIVATIONS_GIB, SLACK_GIB = 4.0, 4.0  # of rows of 1,024 tokens; of CUDA contexts, graphs and PyTorch's own rounding


@pytest.mark.gpu
@pytest.mark.timeout(400)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_each_phase_stays_below_its_budget(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("qwen2_5_vl", text_config=WIDE)
    config = RunConfig(
        output_dir=str(tmp_path / "run"),
        model={"path": str(folder)},
        rollout={
            "prompts_per_step": 4, "group_size": 4, "max_tokens": 48, "max_model_len": 256,
            "memory_fraction": ENGINE_SHARE,
        },
        packing={"row_tokens": 1024},
    )  # fmt: skip
    platform = Platform.resolve("cuda")
    free, total = torch.cuda.mem_get_info()
    before = (total - free) / 2**30
    layout = initialize_parallel(config.parallel, platform)
    train_set, _ = build_datasets(config.data, config.seed)
    run, stop = RunFolder(tmp_path / "run"), StopRequest(60)
    trainer = build_trainer(config, folder, train_set, layout, platform, run, stop)
    trainer.refit.run()
    held_out = Prompts(train_set, range(4))

    def captions():
        return [group.rollouts[0].token_ids for group in trainer.engine.greedy(held_out.of(trainer.replica))]

    captions()
    trainer.step(0)
    updated = captions()
    trainer.save(1)
    assert captions() == updated, "weights survive the engine's sleep"
    metrics = trainer.step(1)
    trainer.checkpoints.finish()

    parameters = list(trainer.learner.policy.parameters())
    weights = sum(parameter.nbytes for parameter in parameters) / 2**30
    state = 16 * sum(p.numel() for p in parameters if p.requires_grad) / 2**30  # gradient, master weight, two moments
    engine = ENGINE_SHARE * total / 2**30
    assert engine > state + ACTIVATIONS_GIB + SLACK_GIB, "else the budgets below would hold without taking turns"
    assert metrics["memory/update_used"] < before + weights + state + ACTIVATIONS_GIB + SLACK_GIB
    assert metrics["memory/rollout_used"] < before + weights + engine + SLACK_GIB
    assert metrics["memory/refit_used"] < before + weights + engine + SLACK_GIB
    assert metrics["rollout/logprob_difference"] < 0.05
    destroy_parallel()
    torch.distributed.destroy_process_group()
