# shellcheck shell=bash
# Creates .venv if it is missing or older than the requirements: bash scripts/venv.sh. If another
# script sources this file, it also defines PYTHON. A marker file holds the hash of the requirements
# from which .venv was made. If PYTHON is set already, that interpreter is used and nothing is
# installed. With OLDEST=yes the environment is .venv-oldest, and every package has the lowest
# version that requirements.txt names, if it names one.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit
if [ -z "${PYTHON:-}" ]; then
    venv=.venv${OLDEST:+-oldest}
    PYTHON=$ROOT/$venv/bin/python
    wanted=$(cat requirements.txt requirements-dev.txt | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$venv/requirements.sha256" 2>/dev/null)" != "$wanted" ]; then
        echo "installing the requirements into $venv (a few minutes, once)"
        lowest=()
        [ -z "${OLDEST:-}" ] ||
            mapfile -t lowest < <(sed -n 's/^\([a-z-]*\)>=\([0-9.]*\).*/\1==\2/p' requirements.txt)
        [ -x "$PYTHON" ] || "${BASE_PYTHON:-python3}" -m venv "$venv"
        "$PYTHON" -m pip install --quiet -r requirements-dev.txt "${lowest[@]}"
        echo "$wanted" >"$venv/requirements.sha256"
    fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
