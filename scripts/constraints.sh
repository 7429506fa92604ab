#!/usr/bin/env bash
# Writes constraints.txt, the exact versions in .venv. Run it when every test has passed with them.
set -euo pipefail
unset PYTHON
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
versions=$("$PYTHON" -m pip freeze --all --exclude pip)
cat >constraints.txt <<HEAD
# The versions with which all tests last passed, on $("$PYTHON" --version). scripts/constraints.sh writes this file.
#     pip install -r requirements.txt -c constraints.txt
$versions
HEAD
