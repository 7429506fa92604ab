#!/usr/bin/env bash
# Gradual magnitude pruning from dense, ERK, 80% sparse, 100 epochs, recipe of the port.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/port.sh" compare/gmp_0.8 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method gmp --distribution erk --sparsity 0.8 \
    --prune-start 20000 --prune-end 50000 --prune-every 1000 "$@"
