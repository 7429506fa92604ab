#!/usr/bin/env bash
# AC/DC, uniform, 90% sparse, 200 epochs. Top-1 published by AC/DC: 76.09.
# conv1 and fc are dense. The rest is 90% sparse: 82.74% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/acdc.sh" acdc/rn50_uniform_0.9_200ep 256 resnet50 \
    --epochs 200 --label-smoothing 0.0 --sparse-method acdc --distribution uniform \
    --sparsity 0.9 --dense-layers conv1 fc "$@"
