#!/usr/bin/env bash
# SET (random growth), ERK, 90% sparse, 100 epochs: a baseline.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_set_erk_0.9 \
    --epochs 100 --sparse-method set --distribution erk --sparsity 0.9 --t-end-fraction 0.8 "$@"
