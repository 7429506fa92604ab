#!/usr/bin/env bash
# RigL, uniform, 90% sparse, 100 epochs. Top-1 published by the earlier port: 72.5.
# conv1 and fc are dense. The rest is 90% sparse: 82.74% of all weights are zero.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/recipes/port.sh" rn50_rigl_uniform_0.9 2048 resnet50 \
    --epochs 100 --label-smoothing 0.1 --sparse-method rigl --distribution uniform \
    --sparsity 0.9 --t-end-fraction 0.8 --dense-layers conv1 fc "$@"
