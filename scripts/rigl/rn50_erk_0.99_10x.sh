#!/usr/bin/env bash
# RigL, ERK, 99% sparse, 10x training. Top-1 published by RigL: 63.89.
# conv1 is dense, outside the ERK budget.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    rn50_erk_0.99_10x resnet50 10 \
    --sparse-method rigl --distribution erk --sparsity 0.99 --dense-layers conv1 "$@"
