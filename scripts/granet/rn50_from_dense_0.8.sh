#!/usr/bin/env bash
# GraNet, from dense, 80% sparse, 100 epochs. No accuracy is quoted (docs/reproducing.md).
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/granet.sh" granet/rn50_from_dense_0.8 128 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method granet --sparsity 0.8 \
    --initial-sparsity 0 --delta-t 4000 "$@"
