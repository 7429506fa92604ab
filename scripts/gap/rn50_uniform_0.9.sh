#!/usr/bin/env bash
# GaP, cyclic, uniform, 90% sparse, 990 epochs. Top-1 published by GaP: 76.348.
# conv1 and fc are dense. The rest is 90% sparse: 82.74% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/gap.sh" gap/rn50_uniform_0.9 2048 resnet50 \
    --epochs 990 --label-smoothing 0.1 --sparse-method gap --distribution uniform --sparsity 0.9 \
    --phase-epochs 30 --num-phases 28 --dense-layers conv1 fc "$@"
