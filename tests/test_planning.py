"""The planner: published rows, refusals with their reasons, the recipes' layouts, measured rows, the command line."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from balcap_mega.config.load import load_config
from balcap_mega.errors import UserError
from balcap_mega.models.released import RELEASED
from balcap_mega.planning.hardware import Cluster, Efficiency
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.measured import ASSUMPTIONS, read_rows
from balcap_mega.planning.plan import Planner
from balcap_mega.planning.published import ROWS
from balcap_mega.planning.search import HEADROOM, search
from balcap_mega.planning.tables import print_assumptions, print_measured
from balcap_mega.planning.workload import Workload, pack_for
from tests.support.plan_command import plan_command

ROOT = Path(__file__).parent.parent
RECIPES = (
    "llava15_7b",
    "qwen2_5_vl_3b",
    "qwen2_5_vl_3b_one_gpu",
    "qwen2_5_vl_7b",
    "qwen2_5_vl_32b",
    "qwen2_5_vl_72b",
    "qwen3_vl_8b",
)


def recipe(name: str, *overrides: str):
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


def cluster_of(name: str) -> Cluster:
    """What the recipe says it is for, where it names the command that chose its layout."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
    command = rf"plan\.py --config configs/{name}\.yaml --nodes (\d+) --search(?: --gpus-per-node (\d+))?`"
    nodes, gpus = re.search(command, text).groups()
    return Cluster(int(nodes), int(gpus or 8))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.source.split()[0]}: {row.name}")
def test_published_rows_are_predicted_within_a_fifth(row):
    assert abs(row.error()) <= 0.2, f"{row.predict(Efficiency()):.1f} instead of {row.value} {row.unit}"


def test_most_published_rows_are_held_out():
    assert sum(row.fitted for row in ROWS) <= len(ROWS) / 3


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_laid_out_as_the_planner_says(name):
    planner = Planner.of(recipe(name), cluster_of(name))
    chosen, found = planner.plan(Layout.of(planner.config)), search(planner)
    assert chosen.step_seconds <= 1.1 * found.plans[0].step_seconds, found.best.layout
    assert chosen.memory.fullest.total <= (1 - HEADROOM) * planner.cluster.gpu.memory


REFUSED = {
    "memory": (["parallel.tensor=1", "parallel.sequence=false"], r"out of memory in update by [\d.]+ GiB: activations"),
    "engine": (["rollout.memory_fraction=0.97"], r"out of memory in rollout by [\d.]+ GiB: engine"),
    "cache": (["rollout.tensor_parallel=1", "rollout.memory_fraction=0.23"], r"cache would hold \d+ tokens"),
    "heads": (["parallel.tensor=8"], "parallel.tensor=8 does not divide the model's num_attention_heads=28"),
    "world": (["parallel.pipeline=3"], "does not divide the 8 processes"),
    "prompts": (["rollout.prompts_per_step=6"], "cannot be shared evenly"),
}


@pytest.mark.parametrize("overrides, reason", REFUSED.values(), ids=REFUSED)
def test_a_refused_layout_says_why(overrides, reason):
    planner = Planner.of(recipe("qwen2_5_vl_7b", *overrides), Cluster(1))
    with pytest.raises(UserError, match=reason):
        planner.plan(Layout.of(planner.config))


def test_fp8_is_refused_where_the_run_would_refuse_it():
    planner = Planner.of(recipe("qwen2_5_vl_3b", "model.fp8=hybrid", "parallel.tensor=4"), Cluster(1))
    with pytest.raises(UserError, match="needs multiples of 128"):
        planner.plan(Layout.of(planner.config))


def test_fp8_keeps_two_bytes_a_weight_from_forward_to_backward():
    planner = Planner.of(recipe("qwen2_5_vl_7b", "model.fp8=hybrid", "rollout.prompts_per_step=64"), Cluster(1))
    update = planner.plan(Layout.of(planner.config)).memory.peak("update")
    layers = 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944)
    assert update.parts["FP8 weights"] == pytest.approx(2 * layers / planner.config.parallel.tensor, rel=1e-4)


def test_a_search_tries_everything_and_keeps_its_reasons():
    planner = Planner.of(recipe("qwen2_5_vl_3b"), Cluster(1))
    found = search(planner)
    assert all(refusal.reason for refusal in found.refusals)
    seconds = [plan.step_seconds for plan in found.plans]
    assert seconds == sorted(seconds) and found.best in found.plans
    too_large = search(Planner.of(recipe("qwen2_5_vl_72b"), Cluster(1)))
    with pytest.raises(UserError, match="no layout of this run fits"):
        print(too_large.best)


def test_a_checkpoint_of_72b_is_shared_out_over_eight_nodes():
    """Of every GPU's host memory it takes at most 1.3 times the share of 12 bytes a trained parameter."""
    planner = Planner.of(recipe("qwen2_5_vl_72b"), Cluster(8))
    layout = Layout.of(planner.config)
    parameters = layout.tensor * sum(stage.language for stage in planner.counts.stages(layout.tensor, layout.pipeline))
    held = planner.plan(layout).memory.host["checkpoint"]
    assert 12 * parameters / 64 < held < 1.3 * 12 * parameters / 64


def test_more_work_and_fewer_gpus_never_take_less():
    config = recipe("qwen2_5_vl_7b")
    layout = Layout.of(config)
    one = Planner.of(config, Cluster(1)).plan(layout)
    two = Planner.of(config, Cluster(2)).plan(layout)
    longer = Planner.of(config, Cluster(1), caption_tokens=350).plan(layout)
    larger = Planner.of(config, Cluster(1), image_tokens=2560).plan(layout)
    unshared = Planner.of(recipe("qwen2_5_vl_7b", "packing.shared_prefix=false"), Cluster(1)).plan(layout)
    slow_judge = Planner.of(config, Cluster(1), captions_per_second=10).plan(layout)
    assert two.step_seconds < one.step_seconds < min(longer.step_seconds, larger.step_seconds)
    assert unshared.seconds["update"] > 2 * one.seconds["update"]
    assert slow_judge.seconds["rewards"] + slow_judge.judge_has == pytest.approx(1024 / 10)


def test_lengths_have_their_mean_and_their_limit():
    planner = Planner.of(recipe("qwen2_5_vl_7b"), Cluster(1))
    lengths = planner.workload.lengths(1024)
    assert sum(lengths) / len(lengths) == pytest.approx(planner.workload.caption_tokens, rel=0.02)
    assert max(lengths) == planner.workload.max_tokens
    rows = pack_for(planner.config, planner.architecture, planner.workload, world=8)
    assert rows.largest.tokens <= planner.config.packing.row_tokens
    assert rows.total.responses * rows.data_size == pytest.approx(sum(lengths), rel=0.02)


def measured_row(**seconds: float) -> dict:
    """A row as benchmarks/throughput.py writes it, of a 3B on one GPU."""
    return {
        "model": "Qwen2.5-VL-3B", "layers": 36, "device": "NVIDIA H100 80GB HBM3", "world_size": 1,
        "layout": {
            "tensor": 1, "pipeline": 1, "sequence": False, "distributed_optimizer": True, "offload": "auto",
            "engine_tensor": 1, "memory_fraction": 0.5,
        },
        "precision": {
            "dtype": "bfloat16", "fp8": "none", "fp8_recipe": "blockwise", "recompute": "full", "rollout_fp8": False,
        },
        "sizes": {
            "prompts": 32, "group_size": 8, "caption_tokens": 175, "prompt_tokens": 600, "image_tokens": 576,
            "row_tokens": 4096,
        },
        "seconds": {"rollout": 4.0, "swap": 1.0, "update": 5.0, "refit": 1.0, "step": 11.0} | seconds,
        "memory_gib": {"weights": 7.0, "gradients": 11.5, "optimizer": 34.5, "update_used": 70.0},
    }  # fmt: skip


def test_measured_rows_are_compared_and_carried_over_to_a_cluster(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([measured_row()]))
    [row] = read_rows(path)
    compared = {found.name: found for found in row.comparisons()}
    assert compared["memory, weights"].predicted == pytest.approx(7.0, rel=0.02)  # 3.75e9 parameters of two bytes
    path.write_text(json.dumps([measured_row(update=2 * row.plan.seconds["update"])]))
    [slow] = read_rows(path)
    assert slow.efficiency().rows == pytest.approx(Efficiency().rows / 2)
    console = Console(file=StringIO(), width=200)
    print_measured(console, [slow])
    print_assumptions(console, slow)
    assert "-50.0%" in console.file.getvalue() and all(text in console.file.getvalue() for text in ASSUMPTIONS)
    config, layout = recipe("qwen2_5_vl_7b"), Layout.of(recipe("qwen2_5_vl_7b"))
    assumed = Planner.of(config, Cluster(2)).plan(layout).update_seconds
    carried = Planner.of(config, replace(Cluster(2), efficiency=slow.efficiency())).plan(layout).update_seconds
    assert carried["train"] > 1.8 * assumed["train"]
    path.write_text('[{"model": "Qwen2.5-VL-3B"}]')
    with pytest.raises(UserError, match="holds no rows of benchmarks"):
        read_rows(path)


def test_command_line(tmp_path):
    found = tmp_path / "plan.json"
    command = ["--config", str(ROOT / "configs" / "qwen2_5_vl_3b.yaml")]
    done = plan_command(*command, "--search", "--json", str(found))
    assert done.returncode == 0, done.stderr
    best = json.loads(found.read_text())["best"]
    pasted = done.stdout.strip().splitlines()[-1].split()
    assert pasted == best["overrides"]
    layout = Layout.of(recipe("qwen2_5_vl_3b", *pasted))
    assert vars(layout) == best["layout"]
    done = plan_command(*command, "packing.row_tokens=65536")
    assert done.returncode == 2 and "error: out of memory in update by" in done.stderr


def test_every_released_model_can_be_planned():
    for name, sizes in RELEASED.items():
        config = recipe("qwen2_5_vl_7b", f"model.path=/nowhere/{name}-Instruct", "rollout.max_model_len=2048")
        planner = Planner.of(config, Cluster(8))
        assert planner.architecture.num_layers == sizes.get("text_config", sizes)["num_hidden_layers"]
        assert isinstance(planner.workload, Workload)
    with pytest.raises(UserError, match="is no released model"):
        Planner.of(recipe("qwen2_5_vl_7b", "model.path=/nowhere/blip"), Cluster(1))
