#!/usr/bin/env bash
#SBATCH --job-name=judge
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A judge for launch/slurm.sh on a node of its own. FILE gets its address once it answers, and loses it when it ends:
#   sbatch launch/judge_slurm.sh FILE [MODEL [vllm serve's options ...]]
#   JUDGE=FILE sbatch launch/slurm.sh --config configs/qwen2_5_vl_7b.yaml ...
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
file="${1:?name the file for the address}" model="${2:-Qwen/Qwen2.5-VL-72B-Instruct}"
shift $(($# < 2 ? $# : 2))
port=$((30000 + ${SLURM_JOB_ID:-0} % 10000))
address="http://$(hostname -f):$port"
PATH="$PWD/.venv/bin:$PATH"

rm -f "$file"
trap 'rm -f "$file"; kill $(jobs -p) 2> /dev/null' EXIT
trap exit TERM # runs the line above
# Without the last option a judge may fill its reply with blanks, which JSON allows, up to its token limit.
python -m vllm.entrypoints.openai.api_server --model "$model" --port "$port" --enable-prefix-caching \
    --tensor-parallel-size "${SLURM_GPUS_ON_NODE:-1}" --max-model-len 16384 \
    --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}' "$@" &
server=$!
until python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$address/health" 2> /dev/null; do
    kill -0 "$server" # it has died: so does this job
    sleep 5
done
echo "$address/v1" > "$file"
wait "$server"
