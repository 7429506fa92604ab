#!/usr/bin/env bash
# Dense MobileNet-v1, 1x training. Top-1 published by RigL: 72.1.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../recipes/rigl.sh" \
    mbv1_dense mobilenet_v1 1 "$@"
