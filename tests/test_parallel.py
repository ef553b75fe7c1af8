"""Platform and layout: Megatron's CPU redirects stay where they are entered, and impossible layouts are refused."""

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from balcap_mega.config.preflight import data_parallel_size
from balcap_mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from balcap_mega.data.scenes.dataset import ScenesDataset
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.policy import build_policy
from balcap_mega.parallel.cpu_redirects import REPLACEMENTS, cpu_redirects
from balcap_mega.parallel.gradients import build_optimizer, wrap_ddp
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel
from balcap_mega.parallel.platform import Platform
from tests.support.distributed import launch
from tests.support.policy_cases import load_reference, load_state, make_case
from tests.support.released import write_config
from tests.test_policy_parity import run_rows

CPU = Platform(torch.device("cpu"), "gloo")


def torch_as_seen() -> dict:
    """Everything the redirects replace, and what they change without replacing it."""
    seen = {f"{owner.__name__}.{name}": getattr(owner, name) for owner, name, _ in REPLACEMENTS}
    return seen | {"modes": _get_current_function_mode_stack(), "type": torch.zeros(1).type()}


def test_redirects_end_with_their_scope():
    before = torch_as_seen()
    with pytest.raises(RuntimeError, match="inside"), cpu_redirects(), cpu_redirects():
        assert torch.zeros(1, device="cuda").device == torch.device("cpu")
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).cuda().to("cuda").device == torch.cuda.current_device()
        raise RuntimeError("inside")
    assert torch_as_seen() == before


def test_a_cuda_run_is_not_redirected():
    before = torch_as_seen()
    with Platform(torch.device("cuda", 0), "nccl").megatron():
        assert torch_as_seen() == before


def caption_between_updates(folder):
    """Greedy captions before and after Megatron updates in the same process; and `torch` as vLLM finds it each time."""
    from balcap_mega.rollout.engine import RolloutEngine
    from balcap_mega.rollout.requests import RolloutRequest

    prompts = [RolloutRequest(index, ScenesDataset(2, seed=0, split="train")[index], index) for index in range(2)]
    rollout = RolloutConfig(max_tokens=16, max_model_len=512)
    engine = RolloutEngine(folder, rollout, device=CPU.device, dtype=torch.float32, seed=0)
    before, captions = torch_as_seen(), engine.greedy(prompts)

    parallel = ParallelConfig()
    initialize_parallel(parallel, CPU)
    policy = build_policy(
        Architecture.from_folder(folder), ModelConfig(path=str(folder), dtype="float32"), parallel, CPU
    )
    load_state(policy, load_reference(folder).state_dict())
    with CPU.megatron():
        model = wrap_ddp(policy, parallel)
        optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-3), parallel)
        run_rows(policy, model, make_case(folder), forward_only=False)
        assert optimizer.step()[0]
    destroy_parallel()
    return torch_as_seen() == before, engine.greedy(prompts) == captions


def test_engine_is_untouched_by_updates_in_its_process(tiny_checkpoint):
    assert launch(1, caption_between_updates, tiny_checkpoint("qwen2_5_vl")) == [(True, True)]


def test_world_must_be_tiled():
    assert data_parallel_size(ParallelConfig(tensor=2, pipeline=2), 8) == 2
    with pytest.raises(UserError, match=r"parallel.tensor=2 x parallel.pipeline=2 does not divide the 6 processes"):
        data_parallel_size(ParallelConfig(tensor=2, pipeline=2), 6)


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ({"tensor": 3}, "parallel.tensor=3 does not divide the model's 28 attention heads"),
        ({"tensor": 7}, "parallel.tensor=7 and the model's 4 key/value heads"),
        ({"tensor": 14}, "parallel.tensor=14 and the model's 4 key/value heads"),
        ({"pipeline": 29}, "parallel.pipeline=29 is more than the model's 28 layers"),
    ],
)
def test_model_must_be_cut_evenly(tmp_path, layout, problem):
    architecture = Architecture.from_folder(write_config(tmp_path, "Qwen2.5-VL-7B"))
    with pytest.raises(UserError, match=problem):
        architecture.check_layout(ParallelConfig(**layout))
