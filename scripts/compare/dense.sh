#!/usr/bin/env bash
# Dense ResNet-50, 100 epochs, recipe of the port.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/port.sh" compare/dense 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 "$@"
