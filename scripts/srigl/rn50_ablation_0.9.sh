#!/usr/bin/env bash
# SRigL, ERK, 90% sparse, 103 epochs. Top-1 published by SRigL: 72.71.
# Written by scripts/rows.py from results/table.csv.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/srigl.sh" srigl/rn50_ablation_0.9 512 resnet50 \
    --epochs 103 --label-smoothing 0.1 --sparse-method srigl --distribution erk --sparsity 0.9 \
    --min-salient 0.3 --t-end 192000 --delta-t 800 --gradient-steps 8 "$@"
