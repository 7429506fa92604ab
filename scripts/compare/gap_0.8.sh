#!/usr/bin/env bash
# GaP, cyclic, ERK, 80% sparse, 100 epochs, recipe of the port.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/port.sh" compare/gap_0.8 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method gap --distribution erk --sparsity 0.8 \
    --phase-epochs 10 --num-phases 8 \
    --partitions 'conv1,layer1.*' 'layer2.*' 'layer3.*' 'layer4.*,fc' "$@"
