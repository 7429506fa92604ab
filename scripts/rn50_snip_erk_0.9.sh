#!/usr/bin/env bash
# SNIP (mask from the first gradient), ERK, 90% sparse, 100 epochs: a baseline.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_snip_erk_0.9 \
    --epochs 100 --sparse-method snip --distribution erk --sparsity 0.9 "$@"
