#!/usr/bin/env bash
# MobileNet-v1, RigL, uniform, 90% sparse, 50x training. Top-1 published by RigL: 70.25.
# conv1 and the depthwise kernels are dense. The rest is 90% sparse: 89.03% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" mbv1_uniform_0.89_50x 4096 mobilenet_v1 50 \
    --epochs 5128 --label-smoothing 0.1 --sparse-method rigl --distribution uniform \
    --sparsity 0.9 --dense-layers conv1 "$@"
