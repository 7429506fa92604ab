#!/usr/bin/env bash
# MobileNet-v1, RigL, uniform, 90% sparse, 100x training. Top-1 published by RigL: 70.59.
# conv1 and the depthwise kernels are dense. The rest is 90% sparse: 89.03% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" mbv1_uniform_0.89_100x 4096 mobilenet_v1 100 \
    --epochs 10256 --label-smoothing 0.1 --sparse-method rigl --distribution uniform \
    --sparsity 0.9 --dense-layers conv1 "$@"
