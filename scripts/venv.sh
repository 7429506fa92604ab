# Sourced by the other scripts: makes .venv where it is missing or older than the requirements,
# then defines PYTHON. A marker holds the hash of the requirements it was made from.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
PYTHON=$ROOT/.venv/bin/python
wanted=$(cat requirements.txt requirements-dev.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/requirements.sha256 2>/dev/null)" != "$wanted" ]; then
    echo "installing the requirements into .venv (a few minutes, once)"
    [ -x "$PYTHON" ] || "${BASE_PYTHON:-python3}" -m venv .venv
    "$PYTHON" -m pip install --quiet -r requirements-dev.txt
    echo "$wanted" >.venv/requirements.sha256
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
