#!/usr/bin/env bash
# Dense ResNet-50, 1x training. Top-1 published by RigL: 76.8.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    rn50_dense resnet50 1 "$@"
