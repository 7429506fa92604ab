#!/usr/bin/env bash
# RigL, uniform, 80% sparse, 5x training. Top-1 published by RigL: 76.71.
# conv1 is dense. The rest is 80% sparse: 79.97% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" rn50_uniform_0.8_5x 4096 resnet50 5 \
    --epochs 513 --label-smoothing 0.1 --sparse-method rigl --distribution uniform \
    --sparsity 0.8 --dense-layers conv1 "$@"
