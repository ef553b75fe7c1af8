"""The whole program over several GPUs and NCCL, refits compared piece by piece; over gloo where DEVICE=cpu asks for it:

DEVICE=cpu .venv/bin/python -m pytest tests/test_several_gpus.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DEVICE = os.environ.get("DEVICE", "cuda")
LAYOUTS = {
    "tensor": (2, "tensor: 2, sequence: true"),
    "data": (2, "tensor: 1"),  # whose engine has halves of what each rank holds whole
    "tensor and pipeline": (4, "tensor: 2, sequence: true, pipeline: 2"),
}
PRECISION = {"cpu": ("float32", 1e-4), "cuda": ("bfloat16", 0.05)}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_smoke_run(tmp_path, ranks, layout):
    if DEVICE == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices; DEVICE=cpu runs it over gloo")
    dtype, tolerance = PRECISION[DEVICE]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = ["launch/pretrain_rl.py", "--config", "configs/scenes_smoke.yaml", f"output_dir={tmp_path / 'run'}"]
    overrides = [
        f"parallel={{device: {DEVICE}, {layout}}}", f"model.dtype={dtype}", "rollout.tensor_parallel=2",
        "rollout.memory_fraction=0.3", "rollout.verify_refit_every=1",
    ]  # fmt: skip
    done = subprocess.run([*torchrun, *program, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["policy/ratio_max_first"] == 1.0
        assert row["rollout/logprob_difference"] <= tolerance, "trainer and engine differ"
        assert row["refit/bytes"] > row["refit/bytes_exchanged"] >= 0
    assert (rows[0]["refit/bytes_exchanged"] > 0) == (ranks == 4 or "sequence" in layout)
    assert list((tmp_path / "run" / "policy").glob("*.safetensors"))
