#!/usr/bin/env bash
# Runs the tests: bash scripts/test.sh [--oldest] [ARGUMENT OF pytest...]
#
#   --oldest   with the oldest supported versions, in an environment of their own (.venv-oldest)
#
# The files of tests are shared out to a process per core, at most four. One process runs them all
# with -n 0, with -s or --pdb, and if an argument names a file, as tests/test_main.py::test_help.
set -euo pipefail
if [[ ${1:-} == --oldest ]]; then
    shift
    unset PYTHON
    OLDEST=yes
fi
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
processes=(-n auto --maxprocesses 4 --dist loadfile)
for argument in "$@"; do
    case $argument in
        -n* | --numprocesses* | *no:xdist | -s | --capture=no | --pdb | *.py | *.py::*) processes=() ;;
    esac
done
exec "$PYTHON" -m pytest -q "${processes[@]}" "$@"
