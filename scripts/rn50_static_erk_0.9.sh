#!/usr/bin/env bash
# A random mask that never changes, ERK, 90% sparse, 100 epochs: a baseline.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_static_erk_0.9 \
    --epochs 100 --sparse-method static --distribution erk --sparsity 0.9 "$@"
