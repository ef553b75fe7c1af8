#!/usr/bin/env bash
# The whole method on a CPU, from nothing: install, warm a small captioner up, then improve it with BalCapRL.
# Arguments go on to the run, e.g.: launch/quickstart.sh seed=1 output_dir=runs/seed1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/torchrun --nproc-per-node 2 launch/pretrain_rl.py --config configs/scenes_cpu.yaml "$@"
