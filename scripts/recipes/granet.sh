#!/usr/bin/env bash
# The recipe of the GraNet repository: recipes/granet.sh ROW GLOBAL_BATCH ARCH FLAG...
# SGD without Nesterov, LR 0.1 that falls by 10 at three milestones, 5 epochs of warm-up. The ramp
# ends at 0.3 of the run, and connections regrow until its end: both are the defaults of
# --sparse-method granet. What differs between rows comes from results/table.csv.
set -euo pipefail
row=$1 batch=$2 arch=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" "$row" "$batch" \
    --arch "$arch" -c fanin --data-backend dali-cpu -j 8 -p 100 \
    --lr 0.1 --lr-schedule step --lr-milestones 30 60 90 --warmup 5 --mom 0.9 --wd 1e-4 "$@"
