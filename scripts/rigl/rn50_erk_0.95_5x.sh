#!/usr/bin/env bash
# RigL, ERK, 95% sparse, 5x training. Top-1 published by RigL: 74.63.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    rn50_erk_0.95_5x resnet50 5 \
    --sparse-method rigl --distribution erk --sparsity 0.95 "$@"
