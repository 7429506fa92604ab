#!/usr/bin/env bash
# Runs the tests: bash scripts/test.sh [--oldest] [ARGUMENT OF pytest...]
#
#   --oldest   with the oldest supported versions, in an environment of their own (.venv-oldest)
set -euo pipefail
if [[ ${1:-} == --oldest ]]; then
    shift
    unset PYTHON
    OLDEST=yes
fi
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec "$PYTHON" -m pytest -q "$@"
