#!/usr/bin/env bash
# RigL, ERK, 95% sparse, 5x training, no label smoothing. Top-1 published by RigL: 74.36.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    rn50_erk_0.95_5x_nols resnet50 5 \
    --sparse-method rigl --distribution erk --sparsity 0.95 --label-smoothing 0 "$@"
