#!/usr/bin/env bash
# MobileNet-v1, RigL, ERK, 90% sparse, 10x training. Top-1 published by RigL: 69.31.
# conv1 and the depthwise kernels are dense. The rest is 90% sparse: 89.03% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" mbv1_erk_0.89_10x 4096 mobilenet_v1 10 \
    --epochs 1026 --label-smoothing 0.1 --sparse-method rigl --distribution erk --sparsity 0.9 \
    --dense-layers conv1 "$@"
