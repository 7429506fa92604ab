#!/usr/bin/env bash
# Runs the tests; arguments go to pytest (bash scripts/test.sh -m slow).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec "$PYTHON" -m pytest -q "$@"
