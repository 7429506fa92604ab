#!/usr/bin/env bash
# RigL, ERK, 99% sparse, 40x training. Top-1 published by RigL: 66.94.
# conv1 is dense. The rest is 99% sparse: 98.96% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" rn50_erk_0.99_40x 4096 resnet50 40 \
    --epochs 4103 --label-smoothing 0.1 --sparse-method rigl --distribution erk --sparsity 0.99 \
    --dense-layers conv1 "$@"
