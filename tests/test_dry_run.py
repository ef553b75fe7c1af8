"""The dry run against reality: a tiny model's real update on two ranks, as PyTorch's profiler and counter see it."""

import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from balcap_mega.config.schema import RunConfig
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.planning.dry_run import refuse_what_does_not_fit
from balcap_mega.planning.dry_run.batches import StepBatches
from balcap_mega.planning.dry_run.step import dry_step
from balcap_mega.planning.hardware import Cluster
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.plan import Planner
from balcap_mega.planning.workload import Workload, pack_for
from balcap_mega.training.build import build_learner
from tests.support.distributed import launch

ROOT = Path(__file__).parent.parent
CPU = Platform(torch.device("cpu"), "gloo")
HELD = ("weights", "gradients", "optimizer")


def run_config(folder: Path) -> RunConfig:
    return RunConfig(
        output_dir="unused",
        model={"path": str(folder)},
        parallel={"tensor": 2, "sequence": True},
        rollout={"prompts_per_step": 4, "group_size": 4, "max_tokens": 256, "max_model_len": 1024},
        packing={"row_tokens": 2048},
    )


def sizes(folder: Path):
    config, architecture = run_config(folder), Architecture.from_folder(folder)
    workload = Workload.of(config, architecture, image_tokens=64, caption_tokens=128)
    return config, architecture, workload, pack_for(config, architecture, workload, world=2)


class Pictures:
    """Real pixels where a dry run has shapes."""

    def host_tensor(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape)


class Sent(TorchDispatchMode):
    """Collectives of more than one rank by operator, and the bytes of the larger side of each."""

    def __init__(self):
        super().__init__()
        self.count, self.size = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            [group] = [each for each in args if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each)]
            if torch.distributed.ProcessGroup.unbox(group).size() > 1:
                name = function._opname.strip("_")
                self.count[name] += 1
                self.size[name] += max(
                    sum(leaf.nbytes for leaf in tree_flatten(argument)[0] if torch.is_tensor(leaf)) for argument in args
                )
        return function(*args, **(kwargs or {}))


def highest_held(learner, microbatches) -> int:
    """Most bytes that an update holds at once beside what was there, by PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner.update(microbatches)
    held = highest = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def real_update(folder: Path) -> dict:
    """What one update takes of this rank."""
    config, architecture, workload, _ = sizes(folder)
    learner_grid = initialize_parallel(config.parallel, CPU)
    learner = build_learner(config, folder, CPU)
    batches = StepBatches(config, architecture, workload, learner_grid, Pictures())
    learner.update(batches.to_train()[0][:1])  # allocates the optimizer's moments
    microbatches = batches.to_train()[0]
    with FlopCounterMode(display=False) as flops, Sent() as sent:
        learner.update(microbatches)
    # Gloo's threads free their buffers when they come to it, which can only add to what is held at once.
    passing = min(highest_held(learner, batches.to_train()[0]) for _ in range(5))
    [part] = learner.optimizer.chained_optimizers
    masters = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    moments = [value for state in part.optimizer.state.values() for value in state.values() if value.dim()]
    trained = [parameter for parameter in learner.policy.parameters() if parameter.requires_grad]
    weights = [*learner.policy.parameters(), *learner.policy.buffers()]
    for module in learner.policy.modules():  # rotary frequencies, which are no buffers
        weights += filter(torch.is_tensor, vars(module).values())
    destroy_parallel()
    return {
        "weights": sum(tensor.nbytes for tensor in weights),
        "gradients": sum(parameter.main_grad.nbytes for parameter in trained),
        "optimizer": sum(tensor.nbytes for tensor in (*masters, *moments, part._scale_one)),
        "passing": passing,
        "flops": flops.get_total_flops(),
        "count": dict(sent.count),
        "size": dict(sent.size),
    }


@pytest.fixture(scope="module")
def both(tiny_checkpoint):
    """(what rank 0 of the real run took, what its dry run says)."""
    folder = tiny_checkpoint("qwen2_5_vl")
    config, _, workload, rows = sizes(folder)
    return launch(2, real_update, folder)[0], dry_step(config, folder, workload, rows, 0, 2, gpu=False)


def test_a_dry_run_allocates_what_the_real_run_allocates(both):
    real, dry = both
    peak, before = dry.peaks["forward and backward"].parts, dry.peaks["rollout"].parts
    assert {kind: peak[kind] for kind in HELD} == {kind: real[kind] for kind in HELD}
    passing = sum(peak[kind] - before[kind] for kind in peak if kind not in HELD)
    assert passing == pytest.approx(real["passing"], rel=0.02)


def test_a_dry_run_computes_and_sends_what_the_real_run_does(both):
    real, dry = both
    assert dry.flops == {"forward and backward": real["flops"]}
    count, size = Counter(), Counter()
    for (_, operation), number in dry.collectives.count.items():
        count[operation] += number
    for (_, operation), number in dry.collectives.size.items():
        size[operation] += number
    assert dict(count) == real["count"] and dict(size) == real["size"]


@pytest.fixture(scope="module")
def on_gpus(tiny_checkpoint):
    """A dry step by a GPU's branches, and its planner."""
    folder = tiny_checkpoint("qwen2_5_vl")
    config, _, workload, rows = sizes(folder)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"ahead": 1})})
    model = json.loads((folder / "config.json").read_text())
    planner = Planner.of(config, Cluster(1, 2), image_tokens=64, caption_tokens=128, model_config=model)
    return dry_step(config, folder, workload, rows, 0, 2), planner


def test_a_gpus_branches_run_and_the_host_waits_where_it_must_alone(on_gpus):
    step, _ = on_gpus
    assert all(step.stand_ins.values()) and {"flash attention", "norm in linear", "AdamW"} <= set(step.stand_ins)
    assert step.flops["scoring"] and step.refit.local_bytes and step.offloaded
    away = step.peaks["rollout"].parts
    assert away["gradients"] == 0 and away["optimizer"] <= 512  # a flag of Megatron's
    waits = {place.where.rsplit(":")[0] for _, place in step.waits.count}
    assert waits == {
        "balcap_mega/algorithm/metrics.py",  # the step's metrics, once
        "balcap_mega/training/learner.py",  # its loss
        "balcap_mega/training/off_policy.py",  # logprobs that are scored
        "megatron/core/distributed/finalize_model_grads.py",  # the number of tokens
        "megatron/core/optimizer/clip_grads.py",  # the gradient's norm
    }


def test_what_does_not_fit_is_refused(on_gpus):
    step, planner = on_gpus
    plan = planner.plan(Layout.of(planner.config), must_fit=False)
    refuse_what_does_not_fit([step], plan, 80 * 2**30)
    with pytest.raises(UserError, match=r"out of memory in rollout on pipeline stage 0: [\d.]+ GiB of 2.0"):
        refuse_what_does_not_fit([step], plan, 2 * 2**30)


@pytest.mark.parametrize("key, value", [("model.fp8", "hybrid"), ("model.attention", "flex")])
def test_what_has_no_stand_in_is_refused(monkeypatch, capsys, key, value):
    config = str(ROOT / "configs" / "qwen2_5_vl_3b.yaml")
    monkeypatch.setattr("sys.argv", ["dry_run.py", "--config", config, f"{key}={value}"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "launch" / "dry_run.py"), run_name="__main__")
    assert end.value.code == 2 and f"error: {key}={value}: a dry run has no stand-in" in capsys.readouterr().err
