#!/usr/bin/env bash
# Build the image nvidia_rn50 from this checkout: docker/build.sh [FLAG OF docker build...]
#
#   bash docker/build.sh
#   bash docker/build.sh --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:25.11-py3
#   bash docker/build.sh --build-arg WITH_APEX=1 --build-arg WITH_DLLOGGER=1
#
# The user in the image gets the numbers of the caller; docker/run.sh chooses anew at every start.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/docker/common.sh"

commit=unknown
if [[ -e $root/.git ]]; then
    commit=$(git -C "$root" rev-parse HEAD)
    [[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] || commit+=+dirty
fi
user=()
if (($(id -u) > 0)); then # for root the Dockerfile's own, which are not root's
    user=(--build-arg "USER_ID=$(id -u)" --build-arg "GROUP_ID=$(id -g)")
fi
[[ $ENGINE != podman ]] || set -- --format docker "$@" # the OCI format has no health check
export DOCKER_BUILDKIT=1
exec "$ENGINE" build --tag "$IMAGE" --build-arg "GIT_COMMIT=$commit" "${user[@]}" "$@" "$root"
