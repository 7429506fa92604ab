#!/usr/bin/env bash
# MobileNet-v1, RigL, uniform, 100x training. Top-1 published by RigL: 70.59.
# 90% of the pointwise and fc weights are zero; conv1 and depthwise kernels are dense (89% overall).
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    mbv1_uniform_0.89_100x mobilenet_v1 100 \
    --sparse-method rigl --distribution uniform --sparsity 0.9 \
    --dense-layers conv1 "$@"
