#!/usr/bin/env bash
# Write the image to a file, with its SHA-256 beside it: docker/save.sh [FILE]
# FILE is nvidia_rn50.tar unless named; docker/load.sh, or docker load -i FILE, reads it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
file=${1:-nvidia_rn50.tar}
require_image

trap 'rm -f "$file.part"' EXIT
"$ENGINE" save --output "$file.part" "$IMAGE"
digest=$(sha256sum <"$file.part" | cut -d' ' -f1)
mv "$file.part" "$file"
echo "$digest  $(basename "$file")" >"$file.sha256"
echo "$file: $(stat --format %s "$file") bytes, sha256 $digest"
