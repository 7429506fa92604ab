#!/usr/bin/env bash
# RigL, uniform, 80% sparse, 100 epochs. Top-1 published by the earlier port: 74.6.
# conv1 and fc are dense. The rest is 80% sparse: 73.55% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_rigl_uniform_0.8 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method rigl --distribution uniform \
    --sparsity 0.8 --t-end-fraction 0.8 --dense-layers conv1 fc "$@"
