#!/usr/bin/env bash
# GraNet, from 50% sparse by ERK, 80% sparse, 100 epochs, recipe of the port.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/port.sh" compare/granet_0.8 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method granet --sparsity 0.8 \
    --initial-sparsity 0.5 --delta-t 250 "$@"
