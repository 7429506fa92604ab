#!/usr/bin/env bash
# Dense MobileNet-v1, 1x training. Top-1 published by RigL: 72.1.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" mbv1_dense 4096 mobilenet_v1 1 \
    --epochs 103 --label-smoothing 0.1 "$@"
