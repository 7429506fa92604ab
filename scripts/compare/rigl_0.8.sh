#!/usr/bin/env bash
# RigL, ERK, 80% sparse, 100 epochs, recipe of the port.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/port.sh" compare/rigl_0.8 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method rigl --distribution erk --sparsity 0.8 \
    --t-end-fraction 0.8 "$@"
