#!/usr/bin/env bash
# Everything that needs a GPU, unattended: tests and measurements, on one H100; where there are two or four, a run over
# them as well.
#   bash benchmarks/h100.sh [--fresh] [--budget SECONDS] [PART ...]
# Parts run in order of their worth, each under a time limit; one that fails or runs out leaves the others alone. With
# --budget no part starts that might not end in time. A second call does only what has not passed. Logs and numbers
# stand in runs/h100/ as soon as they are there; numbers are copied to benchmarks/results/, and all of it, as one archive,
# to $OUT if that is set.
# Ends with one table. Exit status: 0 all parts passed, 1 a part failed or is left, 3 no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=runs/h100
python="${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3 )}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
budget=0 wanted=()
while [ $# -gt 0 ]; do
    case "$1" in
        --fresh) rm -rf "$results" ;;
        --budget) budget="$2" && shift ;;
        *) wanted+=("$1") ;;
    esac
    shift
done
mkdir -p "$results"
[ -e balcap_mega/kernels ] || ln -s ../kernels balcap_mega/kernels # a copy of the tree may have lost its link

if ! "$python" -c 'import balcap_mega.config.schema, megatron.core, torch, triton' 2> "$results/import.log"; then
    echo "error: $python lacks what every part needs — pip install -e '.[cuda]'" >&2
    tail -n 1 "$results/import.log" >&2
    exit 1
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No CUDA device here (torch $("$python" -c 'import torch; print(torch.__version__)'))."
    echo "Not run: the tests marked gpu, and the benchmarks of whole steps, kernels, attention backends, the refit and"
    echo "checkpoints on CUDA. What runs without a GPU: tests/run.sh, which has the kernels interpreted and compiled for"
    echo "sm_90, and $python benchmarks/kernels.py --device cpu."
    exit 3
fi

installed() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
lacking=""
for package in pytest transformer_engine vllm liger_kernel trl; do installed "$package" || lacking+=" $package"; done

names=() states=()
copy_results() {
    cp "$results"/*_h100.json benchmarks/results/ 2> /dev/null
    if [ -n "${OUT:-}" ]; then tar -czf "$OUT/h100.tar.gz" -C "${results%/*}" "${results##*/}"; fi
}
copy_results # an earlier call's, if this is a new copy of the tree
# part NAME SECONDS NEEDS COMMAND...: run it unless it has passed before; its output goes to NAME.log
part() {
    local name="$1" limit="$2" needs="$3" log="$results/$1.log" start=$SECONDS status
    shift 3
    if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
    names+=("$name")
    if [ -e "$results/$name.passed" ]; then
        states+=("passed before")
        return
    fi
    for package in $needs; do
        if [[ " $lacking " == *" $package "* ]]; then
            states+=("left out: $package is not installed")
            return
        fi
    done
    if [ "$budget" -gt 0 ] && [ $((SECONDS + limit)) -gt "$budget" ]; then
        states+=("LEFT: may take $limit s of the $((budget - SECONDS)) s that remain")
        return
    fi
    echo "$name: at most $limit s, log in $log"
    timeout --kill-after=30 "$limit" "$@" > "$log" 2>&1
    status=$?
    case $status in
        0) touch "$results/$name.passed" && states+=("passed in $((SECONDS - start)) s") ;;
        124 | 137) states+=("TIME LIMIT of $limit s, see $log") ;;
        *) states+=("FAILED with status $status, see $log") ;;
    esac
    copy_results
}

tests=("$python" -m pytest -q -m gpu -p no:cacheprovider)
step=("$python" benchmarks/throughput.py --json "$results/throughput_h100.json")
kernels=("$python" benchmarks/kernels.py --device cuda --json "$results/kernels_h100.json" --limit 60)
part tests_kernels 240 pytest "${tests[@]}" tests/test_kernels.py
part tests_attention 120 pytest "${tests[@]}" tests/test_attention.py
part throughput_3b 360 vllm "${step[@]}" --model Qwen2.5-VL-3B
part colocation 300 "pytest vllm" "${tests[@]}" tests/test_colocation.py
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
[ "$gpus" -lt 2 ] || part several_gpus 900 "pytest vllm" "${tests[@]}" tests/test_several_gpus.py
part tests_fp8 240 "pytest transformer_engine" "${tests[@]}" tests/test_fp8.py -k near
part tests_precision 240 "pytest transformer_engine" "${tests[@]}" tests/test_precision.py
part throughput_7b 360 vllm "${step[@]}" --model Qwen2.5-VL-7B --layers 8
part lm_head 400 "" "${kernels[@]}" --ops lm_head --only bound balcap eager
part reward_to_loss 120 "" "${kernels[@]}" --ops reward_to_loss
part attention 180 "" "$python" benchmarks/attention.py --json "$results/attention_h100.json"
part refit 360 vllm "$python" benchmarks/refit.py --model 7b --gib 6 --json "$results/refit_h100.json"
part throughput_7b_fp8 360 "vllm transformer_engine" "${step[@]}" --model Qwen2.5-VL-7B --layers 8 --fp8 hybrid --rollout-fp8
fused=(model.apply_rope_fusion=true model.gradient_accumulation_fusion=true parallel.overlap_grad_reduce=true)
precise=(optimizer.precision_aware=true optimizer.exp_avg_dtype=bfloat16 optimizer.exp_avg_sq_dtype=bfloat16)
narrow=(--set "${fused[@]}" "${precise[@]}" optimizer.main_grads_dtype=bfloat16)
part throughput_7b_fused 360 "vllm transformer_engine" "${step[@]}" --model Qwen2.5-VL-7B --layers 8 --set "${fused[@]}"
part throughput_7b_narrow 360 "vllm transformer_engine" "${step[@]}" --model Qwen2.5-VL-7B --layers 8 "${narrow[@]}"
part throughput_llava 360 vllm "${step[@]}" --model LLaVA-1.5-7B --layers 10
part checkpoint_io 200 "" "$python" benchmarks/checkpoint_io.py --model 7b --gib 4
part logprobs 240 "" "${kernels[@]}" --ops logprobs --only bound balcap eager
part learning_fp8 540 "pytest vllm transformer_engine" "${tests[@]}" tests/test_fp8.py -k learns
mapfile -t others < <(grep -l 'mark\.gpu' tests/test_*.py | grep -vE 'test_(kernels|attention|colocation|fp8|precision|several_gpus)\.py')
[ ${#others[@]} -eq 0 ] || part tests_others 540 pytest "${tests[@]}" "${others[@]}"
part kernels_others 540 "" "${kernels[@]}"

echo
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader 2> /dev/null
[ -z "$lacking" ] || echo "Not installed:$lacking. Parts or rows that need them are missing."
printf '%-18s %s\n' part state
failed=0
for index in "${!names[@]}"; do
    printf '%-18s %s\n' "${names[$index]}" "${states[$index]}"
    case "${states[$index]}" in passed* | "left out"*) ;; *) failed=1 ;; esac
done
for table in throughput kernels; do
    file="$results/${table}_h100.json"
    if [ -e "$file" ]; then echo && "$python" "benchmarks/$table.py" --table "$file"; fi
done
file="$results/throughput_h100.json"
if [ -e "$file" ]; then "$python" launch/plan.py --measured "$file"; fi
exit "$failed"
