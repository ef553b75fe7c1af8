#!/usr/bin/env bash
#SBATCH --job-name=balcap
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@360
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A run on N nodes that outlives its time limit, from the folder of this checkout, with any of the above overridden:
#   sbatch --nodes 4 launch/slurm.sh --config configs/qwen2_5_vl_7b.yaml [key=value ...]
# 360 s before the limit, 60 more than checkpoint.grace_seconds, the ranks save a checkpoint and end, and the job goes
# back into the queue to go on from there. SLURM itself queues a preempted job again, and one whose node has failed; a
# rank that fails is restarted in place.
#   JUDGE=FILE   wait for the settings that launch/judge_slurm.sh writes there, and use those servers
#   DOCTOR=no    start without launch/doctor.py, which otherwise looks at every node first
# To reach other networks than NCCL's own choice: export NCCL_SOCKET_IFNAME, NCCL_IB_HCA before sbatch.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it: sbatch launch/slurm.sh --config FILE}" || exit 2

export NODES="$SLURM_JOB_NUM_NODES" JOB="$SLURM_JOB_ID" PORT=$((20000 + SLURM_JOB_ID % 10000))
FIRST_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export FIRST_NODE RANKS_PER_NODE="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-gpu}}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron overlaps communication with computation only in one queue
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

stopping='' step=''
trap 'stopping=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1 # srun hands it on to every node

on_all_nodes() { # SCRIPT [ARGUMENT...]
    # One task a node with all its cores: bound to those of one task, eight ranks would share a core.
    srun --kill-on-bad-exit=1 --cpu-bind=none bash launch/node.sh "$@" &
    step=$!
    while kill -0 "$step" 2> /dev/null; do
        wait "$step" # returns early at a signal
    done
    wait "$step"
}

judge=()
if [ -n "${JUDGE:-}" ]; then
    until [ -s "$JUDGE" ] || [ -n "$stopping" ]; do sleep 5; done
    [ ! -s "$JUDGE" ] || mapfile -t judge < "$JUDGE"
fi
status=0
if [ "${DOCTOR:-yes}" != no ]; then
    MAX_RESTARTS=0 on_all_nodes launch/doctor.py "$@" "${judge[@]}" || status=$?
fi
if [ "$status" = 0 ] && [ -z "$stopping" ]; then
    on_all_nodes launch/pretrain_rl.py "$@" "${judge[@]}" || status=$?
fi
if [ -n "$stopping" ]; then
    echo "The time limit is near: job $SLURM_JOB_ID goes back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
