#!/usr/bin/env bash
# RigL, uniform, 96.5% sparse, 5x training. Top-1 published by RigL: 71.31.
# Uniform keeps conv1 dense; fc is sparse like the rest.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    rn50_uniform_0.965_5x resnet50 5 \
    --sparse-method rigl --distribution uniform --sparsity 0.965 --dense-layers conv1 "$@"
