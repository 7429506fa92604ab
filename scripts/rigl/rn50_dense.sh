#!/usr/bin/env bash
# Dense ResNet-50, 1x training. Top-1 published by RigL: 76.8.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" rn50_dense 4096 resnet50 1 \
    --epochs 103 --label-smoothing 0.1 "$@"
