#!/usr/bin/env bash
#SBATCH --job-name=judge
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A judge for launch/slurm.sh on nodes of its own, as many servers as their GPUs make. FILE gets the job's settings,
# with all addresses, once every server answers, and is gone when this ends:
#   sbatch --nodes 2 launch/judge_slurm.sh FILE [MODEL [vllm serve's options ...]]
#   JUDGE=FILE sbatch launch/slurm.sh --config configs/qwen2_5_vl_7b.yaml ...
#   TENSOR=4       GPUs of one server; 4 where not given, which a 72B in bf16 needs
#   TEXT_MODEL=Qwen/Qwen2.5-7B-Instruct TEXT_GPUS=2 TEXT_TENSOR=1
#                  so many GPUs of each node serve another model to the questions that see no picture
# A server that dies later is started again; meanwhile the job's requests go to the others.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
file="${1:?name the file for the addresses}" model="${2:-Qwen/Qwen2.5-VL-72B-Instruct}"
shift $(($# < 2 ? $# : 2))
gpus="${SLURM_GPUS_ON_NODE:-1}" text_gpus="${TEXT_GPUS:-0}"
tensor="${TENSOR:-$((gpus < 4 ? gpus : 4))}" text_tensor="${TEXT_TENSOR:-1}"
[ "$text_gpus" = 0 ] || : "${TEXT_MODEL:?name the text model for TEXT_GPUS}"
vision=$(((gpus - text_gpus) / tensor)) text=$((text_gpus / text_tensor))
if [ "$vision" -lt 1 ] || { [ "$text_gpus" -gt 0 ] && [ "$text" -lt 1 ]; }; then
    echo "judge_slurm.sh: $gpus GPUs a node make no server of TENSOR=$tensor beside TEXT_GPUS=$text_gpus" >&2
    exit 2
fi
port=$((20000 + ${SLURM_JOB_ID:-0} * 16 % 20000))
PATH="$PWD/.venv/bin:$PATH"
server=(${JUDGE_SERVER:-python -m vllm.entrypoints.openai.api_server}) # another program that takes the same options

healthy() { python -c 'import sys, urllib.request as u
u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=5)' "$1/health" 2> /dev/null; }

serve() { # PORT FIRST_GPU GPUS MODEL [OPTION...]: restarted when it dies, but not if it has never answered
    local at=$1 first=$2 count=$3 name=$4 answered='' process
    shift 4
    while :; do
        CUDA_VISIBLE_DEVICES="$(seq -s, "$first" $((first + count - 1)))" "${server[@]}" --model "$name" \
            --served-model-name "$name" --port "$at" --tensor-parallel-size "$count" --max-model-len 16384 \
            --max-num-seqs 256 --enable-prefix-caching --enable-prompt-tokens-details \
            --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}' "$@" &
        process=$!
        trap 'kill "$process" 2> /dev/null' EXIT
        trap exit TERM
        while kill -0 "$process" 2> /dev/null; do
            [ -n "$answered" ] || ! healthy "http://127.0.0.1:$at" || answered=yes
            sleep 2
        done
        [ -n "$answered" ] || exit 1
    done
}

# The split copies words of the caption, which a lookup in the prompt guesses several at a time.
lookup='{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'

if [ "${JUDGE_PART:-}" = node ]; then # on each node
    trap 'kill $(jobs -p) 2> /dev/null' EXIT
    trap exit TERM
    picture=(--limit-mm-per-prompt '{"image": 1, "video": 0}')
    [ "$text" != 0 ] || picture+=(--speculative-config "$lookup")
    for ((number = 0; number < vision; number++)); do
        serve $((port + number)) $((number * tensor)) "$tensor" "$model" "${picture[@]}" "$@" &
    done
    for ((number = 0; number < text; number++)); do
        serve $((port + vision + number)) $((gpus - text_gpus + number * text_tensor)) "$text_tensor" \
            "$TEXT_MODEL" --speculative-config "$lookup" "$@" &
    done
    wait -n # only a server that never answered ends
    exit 1
fi

addresses() { # FIRST COUNT: of all nodes, as a list
    local node number list=''
    for node in "${nodes[@]}"; do
        for ((number = $1; number < $1 + $2; number++)); do list+=",http://$node:$((port + number))/v1"; done
    done
    echo "[${list#,}]"
}

start=()
nodes=("$(hostname -f)")
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    start=(srun --kill-on-bad-exit=1 --cpu-bind=none) # a task has all cores of its node
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
fi
rm -f "$file"
JUDGE_PART=node "${start[@]}" bash "${BASH_SOURCE[0]}" "$file" "$model" "$@" &
servers=$!
trap 'rm -f "$file"; kill "$servers" 2> /dev/null; wait "$servers" 2> /dev/null' EXIT
trap exit TERM # runs the line above
for node in "${nodes[@]}"; do
    for ((number = 0; number < vision + text; number++)); do
        until healthy "http://$node:$((port + number))"; do
            kill -0 "$servers" # they have died: so does this job
            sleep 2
        done
    done
done
{
    echo "rewards.endpoint.base_url=$(addresses 0 "$vision")"
    echo "rewards.endpoint.model=$model"
    for question in split units cover language; do
        [ "$text" != 0 ] || break
        echo "rewards.question_endpoints.$question.base_url=$(addresses "$vision" "$text")"
        echo "rewards.question_endpoints.$question.model=$TEXT_MODEL"
    done
} > "$file.partial"
mv "$file.partial" "$file" # whole, or not there
wait "$servers"
