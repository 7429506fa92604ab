#!/usr/bin/env bash
# SRigL, ERK, 95% sparse, 100 epochs, recipe of the port.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/port.sh" compare/srigl_0.95 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method srigl --distribution erk --sparsity 0.95 \
    --t-end-fraction 0.8 "$@"
