#!/usr/bin/env bash
# Install what the tests need, then run them. Arguments go on to pytest, e.g.: tests/run.sh -k length_gate
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh --test
# Tests start processes of their own: one thread each, or they fight for the cores.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest "$@"
