#!/usr/bin/env bash
# The dense network with the recipe of the sparse rows, 100 epochs.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_dense \
    --epochs 100 "$@"
