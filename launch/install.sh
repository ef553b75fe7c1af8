#!/usr/bin/env bash
# Make .venv: the pinned CPU stack and this package, with --test also what the tests need.
# What a lock file describes is installed once: a second call does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/pip ]; then
    python="${PYTHON:-python3.11}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
        echo "error: $python is no Python 3.11 — install it, or name one: PYTHON=/path/to/python3.11 $0" >&2
        exit 2
    fi
    "$python" -m venv .venv
fi
pip_install() { .venv/bin/python -m pip -qq --disable-pip-version-check install --no-deps "$@"; } # shows errors only

# Install one lock file unless its stamp says that this was done, here and with the same content.
install_lock() {
    local lock="$1" stamp=".venv/$(basename "$1").installed" state
    state="$PWD $(cat "$lock" setup.py | sha256sum)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then return; fi
    echo "Installing the $(grep -c '==' "$lock") packages of $lock into .venv ..."
    # PyPI's torch for Linux needs CUDA libraries; PyTorch's own index has the CPU build, unless pip finds it elsewhere.
    local torch index=()
    torch="$(grep '^torch==' launch/cpu.lock)"
    pip_install --dry-run "$torch" 2>/dev/null || index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    pip_install "${index[@]}" --requirement "$lock"
    pip_install --no-build-isolation --editable .
    echo "$state" > "$stamp"
}

install_lock launch/cpu.lock
if [ "${1:-}" = --test ]; then install_lock launch/cpu_test.lock; fi
