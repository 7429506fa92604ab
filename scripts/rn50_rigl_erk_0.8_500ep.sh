#!/usr/bin/env bash
# RigL, ERK, 80% sparse, 500 epochs. Top-1 published by the earlier port: 77.4.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_rigl_erk_0.8_500ep 2048 resnet50 \
    --epochs 500 --label-smoothing 0.1 --sparse-method rigl --distribution erk --sparsity 0.8 \
    --t-end-fraction 0.8 "$@"
