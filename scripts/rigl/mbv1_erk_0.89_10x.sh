#!/usr/bin/env bash
# MobileNet-v1, RigL, ERK, 10x training. Top-1 published by RigL: 69.31.
# 90% of the pointwise and fc weights are zero; conv1 and depthwise kernels are dense (89% overall).
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    mbv1_erk_0.89_10x mobilenet_v1 10 \
    --sparse-method rigl --distribution erk --sparsity 0.9 \
    --dense-layers conv1 "$@"
