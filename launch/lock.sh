#!/usr/bin/env bash
# Resolve what setup.py and its extra `cuda` ask for into launch/cuda.lock. Needs .venv with --test; installs nothing.
#   launch/lock.sh            complete the lock: versions that it holds stay while they fit
#   launch/lock.sh --upgrade  take the newest versions that fit
#   launch/lock.sh --check    exit status 1 if the lock is not what would be resolved, alone or with the extra `flash`,
#                             or does not go with launch/cpu_test.lock
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

requirements() { # EXTRA...: what the installed package asks for, one a line
    .venv/bin/python - "$@" <<'PYTHON'
import sys
from balcap_mega.diagnostics.pins import requirements
print(*(requirement for extra in ("", *sys.argv[1:]) for requirement in requirements(extra)), sep="\n")
PYTHON
}

# Transformer Engine's torch part and flash-attn come as sources only. The former's archive asks for the CUDA 12 core
# because it was packed on such a machine: built against a CUDA 13 torch it asks for the CUDA 13 core, which is here.
echo "transformer-engine-cu12; sys_platform == 'never'" > "$work/overrides"
resolve() { # OUTPUT REQUIREMENTS... [OPTION...]
    .venv/bin/uv pip compile --quiet --no-annotate --custom-compile-command "bash launch/lock.sh" \
        --python-version 3.12 --python-platform x86_64-manylinux_2_31 --no-python-downloads \
        --only-binary :all: --no-binary transformer-engine-torch --no-binary flash-attn \
        --override "$work/overrides" --output-file "$@"
}

requirements cuda > "$work/cuda.in"
case "${1:-}" in
    '' | --upgrade) resolve launch/cuda.lock "$work/cuda.in" "$@" ;;
    --check)
        cp launch/cuda.lock "$work/cuda.lock"
        resolve "$work/cuda.lock" "$work/cuda.in"
        diff launch/cuda.lock "$work/cuda.lock" # exit status 1 if they differ
        requirements cuda flash > "$work/flash.in"
        resolve "$work/flash.lock" "$work/flash.in" launch/cuda.lock
        resolve "$work/test.lock" launch/cuda.lock launch/cpu_test.lock
        echo "launch/cuda.lock: $(grep -c '==' launch/cuda.lock) packages, resolved for Python 3.12 on Linux"
        ;;
    *) echo "error: no option $1 — see the first lines of $0" >&2 && exit 2 ;;
esac
