#!/usr/bin/env bash
# Load the image from a file that docker/save.sh wrote: docker/load.sh [FILE]
# FILE is nvidia_rn50.tar unless named; it has to match FILE.sha256.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
file=${1:-nvidia_rn50.tar}

[[ -f $file ]] || fail "there is no file $file: docker/save.sh writes it"
[[ -f $file.sha256 ]] || fail "there is no $file.sha256 to check $file with: copy it along," \
    "or load unchecked with $ENGINE load -i $file"
[[ $(sha256sum <"$file" | cut -d' ' -f1) == $(cut -d' ' -f1 "$file.sha256") ]] ||
    fail "$file is damaged (it does not match $file.sha256): copy it again"
exec "$ENGINE" load --input "$file"
