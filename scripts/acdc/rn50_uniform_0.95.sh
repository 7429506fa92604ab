#!/usr/bin/env bash
# AC/DC, uniform, 95% sparse, 100 epochs. Top-1 published by AC/DC: 73.28.
# conv1 and fc are dense. The rest is 95% sparse: 87.34% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/acdc.sh" acdc/rn50_uniform_0.95 256 resnet50 \
    --epochs 100 --label-smoothing 0.0 --sparse-method acdc --distribution uniform \
    --sparsity 0.95 --dense-layers conv1 fc "$@"
