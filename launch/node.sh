#!/usr/bin/env bash
# One node's ranks under torchrun: launch/node.sh SCRIPT [ARGUMENT...]. SLURM starts it on every node (launch/slurm.sh).
# SIGUSR1 and SIGTERM go to the ranks, which save a checkpoint and exit. torchrun itself would die of the first, and on
# the second it would kill its ranks after 30 s.
#   NODES, NODE, FIRST_NODE, PORT, JOB   how many, which (from 0), where they meet, who they are; default: one, alone
#   RANKS_PER_NODE, MAX_RESTARTS         default: one a GPU, and 3 restarts of all ranks when one has failed
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PATH="$PWD/.venv/bin:$PATH"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

meeting=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
    meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$FIRST_NODE:$PORT" --rdzv-id "$JOB"
        --rdzv-conf "is_host=$([ "${NODE:-${SLURM_NODEID:-}}" = 0 ] && echo true || echo false)")
fi

# Ignored signals stay so in what is started from here: torchrun, and each rank until it has a handler of its own.
(
    trap '' USR1
    exec torchrun "${meeting[@]}" --nproc-per-node "${RANKS_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-3}" "$@"
) &
torchrun=$!
trap 'pkill -USR1 --parent "$torchrun"' USR1 TERM

while kill -0 "$torchrun" 2> /dev/null; do
    wait "$torchrun" # returns early at a signal
done
wait "$torchrun"
