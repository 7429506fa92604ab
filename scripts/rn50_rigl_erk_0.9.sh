#!/usr/bin/env bash
# RigL, ERK, 90% sparse, 100 epochs. Top-1 published by the earlier port: 73.9.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_rigl_erk_0.9 \
    --epochs 100 --sparse-method rigl --distribution erk --sparsity 0.9 --t-end-fraction 0.8 "$@"
