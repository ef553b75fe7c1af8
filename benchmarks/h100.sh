#!/usr/bin/env bash
# GPU tests, kernels, attention backends and the refit on one H100, unattended: bash benchmarks/h100.sh [--fresh]
# Every part has a time limit; a part that fails or runs out leaves the others alone. Logs stay in runs/h100/, numbers in
# benchmarks/results/kernels_h100.json, and a second call does only what is missing there. Ends with one table.
# Exit status: 0 all parts passed, 1 a part failed, 3 no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=runs/h100
numbers=benchmarks/results/kernels_h100.json
python="${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3 )}"
[ "${1:-}" = --fresh ] && rm -rf "$results" "$numbers"
mkdir -p "$results"

if ! "$python" -c 'import balcap_mega, torch, triton' 2> "$results/import.log"; then
    echo "error: $python cannot import balcap_mega, torch and triton — pip install -e '.[cuda]'" >&2
    tail -n 1 "$results/import.log" >&2
    exit 1
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No CUDA device here (torch $("$python" -c 'import torch; print(torch.__version__)'))."
    echo "Not run: the tests marked gpu, and the benchmarks of kernels, attention backends and the refit on CUDA."
    echo "What runs without a GPU: tests/run.sh, which has the kernels interpreted and compiled for sm_90,"
    echo "and $python benchmarks/kernels.py --device cpu."
    exit 3
fi
for package in liger_kernel trl; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" ||
        echo "$package is not installed: its rows will be missing."
done

names=() states=()
# part NAME SECONDS COMMAND...: run it unless it has passed before; its output goes to NAME.log
part() {
    local name="$1" limit="$2" log="$results/$1.log" start=$SECONDS status
    shift 2
    names+=("$name")
    if [ -e "$results/$name.passed" ]; then
        states+=("passed before")
        return
    fi
    echo "$name: at most $limit s, log in $log"
    timeout --kill-after=30 "$limit" "$@" > "$log" 2>&1
    status=$?
    case $status in
        0) touch "$results/$name.passed" && states+=("passed in $((SECONDS - start)) s") ;;
        5) touch "$results/$name.passed" && states+=("passed: there are none") ;; # pytest's word for no tests
        124 | 137) states+=("TIME LIMIT of $limit s, see $log") ;;
        *) states+=("FAILED with status $status, see $log") ;;
    esac
}

benchmark=("$python" benchmarks/kernels.py --device cuda --json "$numbers" --limit 120)
part tests_kernels 600 "$python" -m pytest tests/test_kernels.py -q -m gpu
part tests_gpu 900 "$python" -m pytest tests -q -m gpu --deselect tests/test_kernels.py
part reward_to_loss 300 "${benchmark[@]}" --ops reward_to_loss
part lm_head 1200 "${benchmark[@]}" --ops lm_head
part logprobs 600 "${benchmark[@]}" --ops logprobs
part attention 600 "$python" benchmarks/attention.py --json benchmarks/results/attention_h100.json
if "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"; then
    part refit 900 "$python" benchmarks/refit.py --model 7b --gib 13 --json benchmarks/results/refit_h100.json
else
    echo "vllm is not installed: the refit is left out."
fi

echo
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader 2> /dev/null
printf '%-16s %s\n' part state
failed=0
for index in "${!names[@]}"; do
    printf '%-16s %s\n' "${names[$index]}" "${states[$index]}"
    case "${states[$index]}" in passed*) ;; *) failed=1 ;; esac
done
echo
"$python" benchmarks/kernels.py --table "$numbers" || failed=1
exit "$failed"
