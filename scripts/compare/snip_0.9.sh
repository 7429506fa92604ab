#!/usr/bin/env bash
# SNIP (mask from the first gradient), ERK, 90% sparse, 100 epochs, recipe of the port.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/port.sh" compare/snip_0.9 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method snip --distribution erk --sparsity 0.9 \
    "$@"
