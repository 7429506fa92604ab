#!/usr/bin/env bash
# SNFS (momentum growth, redistribution), ERK, 90% sparse, 100 epochs, recipe of the port.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/port.sh" compare/snfs_0.9 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method snfs --distribution erk --sparsity 0.9 \
    --t-end-fraction 0.8 "$@"
