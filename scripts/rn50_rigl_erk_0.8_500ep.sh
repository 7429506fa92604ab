#!/usr/bin/env bash
# RigL, ERK, 80% sparse, 500 epochs. Top-1 published by the earlier port: 77.4.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_rigl_erk_0.8_500ep \
    --epochs 500 --sparse-method rigl --distribution erk --sparsity 0.8 --t-end-fraction 0.8 "$@"
