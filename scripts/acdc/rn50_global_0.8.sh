#!/usr/bin/env bash
# AC/DC, all layers together, 80% sparse, 100 epochs. Top-1 published by AC/DC: 76.45.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/acdc.sh" acdc/rn50_global_0.8 256 resnet50 \
    --epochs 100 --label-smoothing 0.0 --sparse-method acdc --sparsity 0.8 --scope global "$@"
