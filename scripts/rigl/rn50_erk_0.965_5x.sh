#!/usr/bin/env bash
# RigL, ERK, 96.5% sparse, 5x training. Top-1 published by RigL: 72.77.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" rn50_erk_0.965_5x 4096 resnet50 5 \
    --epochs 513 --label-smoothing 0.1 --sparse-method rigl --distribution erk --sparsity 0.965 \
    "$@"
