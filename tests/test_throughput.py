"""`benchmarks/throughput.py` runs, and its row holds what the planner reads."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = [
    "--prompts",
    "2",
    "--group-size",
    "2",
    "--caption-tokens",
    "8",
    "--image-size",
    "112",
    "--max-model-len",
    "256",
]


def test_throughput_row(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/throughput.py", "--model", "tiny", "--layers", "2", "--offload", *SMALL]
    command += ["--set", "parallel.overlap_grad_reduce=true"]
    done = subprocess.run(
        [*command, "--row-tokens", "512", "--steps", "1", "--json", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    [row] = json.loads(file.read_text())
    assert row["layout"]["overlap_grad_reduce"]
    size, seconds = row["sizes"], row["seconds"]  # a caption's last token is predicted, but predicts nothing
    assert (size["image_tokens"], size["packed_tokens"]) == (16, 2 * (size["prompt_tokens"] + 2 * 7))
    assert {"rollout", "swap", "rewards", "update", "refit", "step"} <= seconds.keys()
    assert seconds["step"] == sum(value for phase, value in seconds.items() if phase != "step")
    assert row["tokens_per_second_per_gpu"]["response"] == 2 * 2 * 8 / seconds["step"]
    assert row["refit_seconds"].keys() == {"offload", "wake", "transfer", "finalise"}
    assert row["memory_gib"]["optimizer"] >= 2 * row["memory_gib"]["gradients"]  # two moments of float32
    assert row["flops"]["update"] > row["flops"]["rollout"] > 0
    assert row["logprob_difference"] < 1e-4, "the engine has other weights than the learner"
