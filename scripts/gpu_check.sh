#!/usr/bin/env bash
# What only a machine with a GPU can show: the tests for GPUs, then the figures of benchmarks/gpu.py.
#
#   bash scripts/gpu_check.sh [--quick] [--compile] [--markdown]
#
# Some minutes. quick: fewer rounds, no photos. compile: a run of main.py --compile, too.
#
# Ends with one JSON object. Needs no network and no data. Without a GPU: one line, exit status 2.
#
#   PYTHON   interpreter (default .venv/bin/python if there is one, else python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$root/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu_check: error: torch finds no GPU on this machine" >&2
    exit 2
fi
# Only the files that take the fixture `device`: others import packages that may not be here.
mapfile -t files < <(grep -rlE "device: torch\.device" tests --include='test_*.py' | sort)
status=0
"$PYTHON" -m pytest -q -rs --durations 10 -m gpu "${files[@]}" || status=$?
"$PYTHON" benchmarks/gpu.py --json "$@" || status=$?
exit "$status"
