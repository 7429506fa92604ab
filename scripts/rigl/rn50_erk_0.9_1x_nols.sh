#!/usr/bin/env bash
# RigL, ERK, 90% sparse, 1x training, no label smoothing. Top-1 published by RigL: 73.4.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" rn50_erk_0.9_1x_nols 4096 resnet50 1 \
    --epochs 103 --label-smoothing 0.0 --sparse-method rigl --distribution erk --sparsity 0.9 \
    "$@"
