#!/usr/bin/env bash
# RigL, uniform, 96.5% sparse, 5x training. Top-1 published by RigL: 71.31.
# conv1 is dense. The rest is 96.5% sparse: 96.46% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" rn50_uniform_0.965_5x 4096 resnet50 5 \
    --epochs 513 --label-smoothing 0.1 --sparse-method rigl --distribution uniform \
    --sparsity 0.965 --dense-layers conv1 "$@"
