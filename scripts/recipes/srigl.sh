#!/usr/bin/env bash
# The recipe of the SRigL repository: recipes/srigl.sh ROW GLOBAL_BATCH ARCH FLAG...
# Nesterov, LR 0.2 that falls by 10 at three milestones, 5 epochs of warm-up. What differs between
# rows comes from results/table.csv.
set -euo pipefail
row=$1 batch=$2 arch=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" "$row" "$batch" \
    --arch "$arch" -c fanin --data-backend dali-cpu -j 8 -p 100 \
    --lr 0.2 --lr-schedule step --lr-milestones 30 70 90 --lr-per-step --warmup 5 \
    --mom 0.9 --nesterov --wd 1e-4 "$@"
