#!/usr/bin/env bash
# Start main.py for one row: bash scripts/train.sh ROW GLOBAL_BATCH FLAG...
#
# The global batch belongs to the row, the number of GPUs does not: on any number that divides it
# the batch is kept by gradient accumulation, and the first line says how. Later flags win.
#
#   DATA         directory with train/ and val/ (default /data/imagenet)
#   RESULTS      checkpoints and raport (default results/runs/ROW)
#   NPROC        processes on this node (default: its GPUs)
#   BATCH_SIZE   most images per process and micro-batch (default 256)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several nodes without SLURM: run once on each
#   PYTHON       interpreter (default .venv/bin/python if there is one, else python3)
#
# Under SLURM the processes are the tasks of the job: one per GPU. Works from an srun step or, with
# the same line, from a batch script. --dry-run prints the plan and needs neither data nor GPU.
set -euo pipefail

row=$1 global=$2
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$root/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
data=${DATA:-/data/imagenet}
results=${RESULTS:-$root/results/runs/$row}
nnodes=${NNODES:-1}
nproc=${NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
((nproc > 0)) || nproc=1
world=$((nnodes * nproc))
launch=("$PYTHON")
if [[ -n ${SLURM_STEP_NUM_TASKS:-} && -n ${SLURM_PROCID:-} ]] && ((SLURM_STEP_NUM_TASKS > 1)); then
    world=$SLURM_STEP_NUM_TASKS # this script is itself one task of the step
elif [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_NUM_TASKS:-} ]] && ((${SLURM_NTASKS:-1} > 1)); then
    world=$SLURM_NTASKS
    launch=(srun "$PYTHON")
elif ((nnodes > 1)); then
    launch+=(-m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$nproc"
        --node-rank "${NODE_RANK:?is needed with NNODES}"
        --master-addr "${MASTER_ADDR:?is needed with NNODES}"
        --master-port "${MASTER_PORT:-29500}")
elif ((world > 1)); then
    launch+=(-m torch.distributed.run --standalone --nproc-per-node "$nproc")
fi

if ((global % world)); then
    echo "$row: $world processes do not divide its global batch of $global" >&2
    exit 2
fi
micro=$((global / world))
steps=1
while ((micro * steps < global / world || micro > ${BATCH_SIZE:-256})); do
    steps=$((steps + 1))
    micro=$((global / world / steps))
done
echo "$row: global batch $global = $world processes x $micro images x $steps accumulated" >&2

for flag in "$@"; do
    if [[ $flag == --dry-run ]]; then
        launch=(env "WORLD_SIZE=$world" "$PYTHON")
        dry=yes
    fi
done
[[ ${dry:-} ]] || mkdir -p "$results"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${launch[@]}" "$root/main.py" "$data" --workspace "$results" --raport-file raport.json \
    --optimizer-batch-size "$global" -b "$micro" "$@"
