#!/usr/bin/env bash
# RigL, uniform, 80% sparse, 5x training. Top-1 published by RigL: 76.71.
# Uniform keeps conv1 dense; fc is sparse like the rest.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    rn50_uniform_0.8_5x resnet50 5 \
    --sparse-method rigl --distribution uniform --sparsity 0.8 --dense-layers conv1 "$@"
