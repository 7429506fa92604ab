#!/usr/bin/env bash
# SNFS (momentum growth, redistribution), ERK, 80% sparse, 100 epochs: a baseline.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_snfs_erk_0.8 \
    --epochs 100 --sparse-method snfs --distribution erk --sparsity 0.8 --t-end-fraction 0.8 "$@"
