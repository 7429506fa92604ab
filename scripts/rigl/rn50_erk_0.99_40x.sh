#!/usr/bin/env bash
# RigL, ERK, 99% sparse, 40x training. Top-1 published by RigL: 66.94.
# conv1 is dense, outside the ERK budget.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    rn50_erk_0.99_40x resnet50 40 \
    --sparse-method rigl --distribution erk --sparsity 0.99 --dense-layers conv1 "$@"
