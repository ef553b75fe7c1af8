#!/usr/bin/env bash
# Make .venv: the pinned stack and this package. What a lock file describes is installed once: a second call does nothing.
#   launch/install.sh                 for CPUs, Python 3.11
#   launch/install.sh --cuda          for NVIDIA GPUs: Python 3.12, glibc 2.31, a driver for CUDA 13, a C++ compiler
#   ... --test                        with what the tests need
#   ... --download DIR                on any connected Linux: put all the wheels into DIR, install nothing
#   ... --wheels DIR                  install from DIR alone, on a host that can download nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stack=cpu version=3.11 test='' download='' wheels=''
while [ $# -gt 0 ]; do
    case "$1" in
        --cuda) stack=cuda version=3.12 ;;
        --test) test=yes ;;
        --download) download="${2:?--download needs a folder}" && shift ;;
        --wheels) wheels="$(realpath "${2:?--wheels needs a folder}")" && shift ;;
        *) echo "error: no option $1 — see the first lines of $0" >&2 && exit 2 ;;
    esac
    shift
done
locks=("launch/$stack.lock" ${test:+launch/cpu_test.lock})
# PyPI has no wheel of it; its archive can be read only where torch is, and takes minutes to build.
built_here=transformer-engine-torch

# PyPI's torch for Linux needs CUDA libraries; PyTorch's own index has the CPU build, unless pip finds it elsewhere.
torch_index() { # COMMAND...: pip's command, tried without that index
    local torch
    torch="$(grep '^torch==.*+cpu$' "launch/$stack.lock")" || return 0
    "$@" --no-deps "$torch" > /dev/null 2>&1 || echo --extra-index-url https://download.pytorch.org/whl/cpu
}

download_wheels() {
    local python="${PYTHON:-python3}" lock source link platforms=() index
    for platform in manylinux_2_{31..5} manylinux{2014,2010,1} linux; do
        platforms+=(--platform "${platform}_x86_64")
    done
    mkdir -p "$download"
    local fetch=("$python" -m pip -qq --disable-pip-version-check download --dest "$download" --no-deps
        --only-binary :all: --implementation cp --python-version "$version" "${platforms[@]}")
    read -ra index <<< "$(torch_index "${fetch[@]}")"
    for lock in "${locks[@]}"; do
        echo "Downloading the packages of $lock into $download ..."
        grep -v "^$built_here==" "$lock" > "$download/requirements.txt"
        "${fetch[@]}" "${index[@]}" --requirement "$download/requirements.txt"
        if source="$(grep "^$built_here==" "$lock")"; then
            # pip runs an archive's setup.py before it saves it, and this one wants torch: ask pip only where it lies.
            link="$("$python" -m pip -vv download --dest "$download" --no-deps --no-build-isolation \
                --no-binary :all: "$source" 2>&1 |
                grep -oE "https://[^ #]*/${built_here//-/_}-${source#*==}\.tar\.gz" | head -n 1 || true)"
            "$python" -c 'import sys, urllib.request as u; u.urlretrieve(*sys.argv[1:])' \
                "${link:?pip finds no archive of $source}" "$download/${link##*/}"
        fi
    done
    rm "$download/requirements.txt"
    echo "$(find "$download" -type f | wc -l) files, $(du -sh "$download" | cut -f 1). Copy them and this checkout to the host; there:"
    echo "    bash launch/install.sh${options} --wheels DIR"
}
options="$([ "$stack" = cpu ] || echo " --$stack")${test:+ --test}"
if [ -n "$download" ]; then
    download_wheels
    exit
fi

if [ ! -x .venv/bin/pip ]; then
    python="${PYTHON:-python$version}"
    if ! "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2> /dev/null; then
        echo "error: $python is no Python $version — install it, or name one: PYTHON=/path/to/python$version $0$options" >&2
        exit 2
    fi
    "$python" -m venv .venv
elif ! .venv/bin/python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')"; then
    echo "error: .venv has another Python than $version, which launch/$stack.lock is for — remove .venv" >&2
    exit 2
fi
pip_install() { # shows errors only
    .venv/bin/python -m pip -qq --disable-pip-version-check install --no-deps --no-build-isolation \
        ${wheels:+--no-index --find-links "$wheels"} "$@"
}

# Install one lock file unless its stamp says that this was done, here and with the same content.
install_lock() {
    local lock="$1" stamp=".venv/${1##*/}.installed" state index=() source
    state="$PWD $(cat "$lock" setup.py | sha256sum)"
    if [ "$(cat "$stamp" 2> /dev/null)" = "$state" ]; then return; fi
    echo "Installing the $(grep -c '==' "$lock") packages of $lock into .venv ..."
    if [ -z "$wheels" ]; then read -ra index <<< "$(torch_index pip_install --dry-run)"; fi
    pip_install "${index[@]}" --requirement <(grep -v "^$built_here==" "$lock")
    if source="$(grep "^$built_here==" "$lock")"; then
        echo "Building $source ..."
        # It needs the headers alone, which the wheels have; no CUDA toolkit, and no wheel from elsewhere.
        local nvidia
        nvidia="$(.venv/bin/python -c 'import nvidia; print(list(nvidia.__path__)[0])')"
        NVTE_PYTORCH_FORCE_BUILD=TRUE CPATH="$nvidia/cudnn/include:$nvidia/nccl/include:$nvidia/cu13/include" \
            pip_install "$source"
    fi
    pip_install --editable .
    echo "$state" > "$stamp"
}

for lock in "${locks[@]}"; do install_lock "$lock"; done
