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
#   MAX_RESTARTS how often the launcher starts all processes again when one failed (default 0); give
#                --resume auto with it
#   PYTHON       interpreter (default .venv/bin/python if there is one, else python3)
#
# Several nodes without SLURM: run it once on each of them, with the same flags and with
#
#   NNODES       nodes; MIN:MAX for as many as there are
#   NODE_RANK    0 on the node of MASTER_ADDR, another number on the others
#   MASTER_ADDR, MASTER_PORT   where the nodes find each other (default port 29500)
#   NODE_ADDR    this node's own address; needed if its host name does not resolve to it
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
needed=(torch torchvision jsonargparse)
found="import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
if ! "$PYTHON" -c "$found" "${needed[@]}" &>/dev/null; then
    echo "$row: error: $PYTHON lacks ${needed[*]}:" \
        "run bash $root/scripts/venv.sh, which makes .venv, or set PYTHON" >&2
    exit 2
fi
data=${DATA:-/data/imagenet}
results=${RESULTS:-$root/results/runs/$row}
nnodes=${NNODES:-1}
nproc=${NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
((nproc > 0)) || nproc=1
max_nodes=${nnodes#*:}
world=$((max_nodes * nproc)) # with fewer nodes main.py accumulates more
launch=("$PYTHON")
if [[ -n ${SLURM_STEP_NUM_TASKS:-} && -n ${SLURM_PROCID:-} ]] && ((SLURM_STEP_NUM_TASKS > 1)); then
    world=$SLURM_STEP_NUM_TASKS # this script is itself one task of the step
elif [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_NUM_TASKS:-} ]] && ((${SLURM_NTASKS:-1} > 1)); then
    world=$SLURM_NTASKS
    launch=(srun "$PYTHON")
elif ((max_nodes > 1)); then
    # is_host is given explicitly: torchrun's own guess fails if the host name resolves to 127.0.0.1,
    # and all nodes would then wait for each other.
    is_host=$((${NODE_RANK:?is needed with NNODES} == 0))
    launch+=(-m image_classification.launch --nnodes "$nnodes" --nproc-per-node "$nproc"
        --rdzv-backend c10d --rdzv-id "$row" --rdzv-conf "is_host=$is_host"
        --rdzv-endpoint "${MASTER_ADDR:?is needed with NNODES}:${MASTER_PORT:-29500}"
        --max-restarts "${MAX_RESTARTS:-0}")
    [[ -z ${NODE_ADDR:-} ]] || launch+=(--local-addr "$NODE_ADDR")
elif ((world > 1)); then
    launch+=(-m image_classification.launch --standalone --nproc-per-node "$nproc"
        --max-restarts "${MAX_RESTARTS:-0}")
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
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # for the launcher, wherever this is started
exec "${launch[@]}" "$root/main.py" "$data" --workspace "$results" --raport-file raport.json \
    --optimizer-batch-size "$global" -b "$micro" "$@"
