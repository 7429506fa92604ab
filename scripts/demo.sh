#!/usr/bin/env bash
# Trains a small network on handwritten digits three times - dense, with a fixed random mask, with
# RigL - through main.py, then prints a table and draws demo/report.png. The log: demo/demo.log.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec "$PYTHON" scripts/demo.py "$@"
