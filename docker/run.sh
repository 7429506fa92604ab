#!/usr/bin/env bash
# Run a command in the image, a shell unless one is named:
#   docker/run.sh [--cpu] [--results=DIR] [--NAME=VALUE...] IMAGENET [COMMAND...]
#
#   bash docker/run.sh /data/imagenet bash scripts/rn50_rigl_erk_0.9.sh
#   bash docker/run.sh --cpu none bash scripts/demo.sh --output results/demo
#
#   IMAGENET       directory with train/ and val/, read-only in the image as /data/imagenet; or the
#                  word none
#   --cpu          no GPU
#   --results=DIR  directory that is the image's results/ (default: results/ of this checkout); what
#                  the command writes there belongs to the caller
#   --NAME=VALUE   more flags for the engine, such as --network=host
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/docker/common.sh"

run=("$ENGINE" run)
flags=(--rm --init --ipc=host --ulimit=stack=67108864 --stop-timeout=60)

# All GPUs, unless the flags given name some (--gpus=..., for Podman --device=nvidia.com/gpu=...).
use_gpus() {
    command -v nvidia-smi >/dev/null ||
        fail "there is no NVIDIA driver (nvidia-smi) here: install it, or give --cpu"
    flags+=(--ulimit=memlock=-1) # pinned memory
    [[ " ${extra[*]} " != *" --gpus="* && " ${extra[*]} " != *" --device=nvidia.com/gpu="* ]] ||
        return 0
    if [[ $ENGINE == podman ]]; then
        nvidia-ctk cdi list 2>/dev/null | grep -q '^nvidia.com/gpu=all$' ||
            fail "Podman knows no GPU: run nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml," \
                "or give --cpu"
        flags+=(--device=nvidia.com/gpu=all)
    elif command -v nvidia-docker >/dev/null; then
        run=(nvidia-docker run)
    elif command -v nvidia-ctk >/dev/null || command -v nvidia-container-cli >/dev/null; then
        flags+=(--gpus=all)
    else
        fail "the NVIDIA Container Toolkit (nvidia-ctk) is not installed: install it, or give --cpu"
    fi
}

# Run as the caller's UID and GID, whatever the engine maps them to.
become_caller() {
    local user
    user=$(id -u):$(id -g)
    if [[ $ENGINE == podman ]]; then
        flags+=(--security-opt=label=disable) # SELinux would forbid the mounts
        (($(id -u) == 0)) || flags+=(--userns=keep-id)
    elif [[ $(docker info --format '{{.SecurityOptions}}') == *name=rootless* ]]; then
        user=0:0 # which is the caller's UID and GID outside of the container
    fi
    flags+=(--user="$user")
}

cpu=
results=$root/results
extra=()
while [[ ${1:-} == -* ]]; do
    case $1 in
        --cpu) cpu=yes ;;
        --results=*) results=${1#*=} ;;
        --*=*) extra+=("$1") ;;
        *) fail "$1: write the engine's flags as --name=value" ;;
    esac
    shift
done
(($#)) || fail "which IMAGENET? Give its directory, or the word none"
imagenet=$1
shift
[[ $cpu ]] || use_gpus
require_image
become_caller

if [[ $imagenet != none ]]; then
    for split in train val; do
        [[ -d $imagenet/$split ]] ||
            fail "$imagenet has no directory $split: scripts/prepare_imagenet.sh makes it"
    done
    flags+=(--mount "type=bind,source=$(realpath "$imagenet"),target=/data/imagenet,readonly")
fi
mkdir -p "$results"
flags+=(--mount "type=bind,source=$(realpath "$results"),target=/workspace/rn50/results")
[[ ! -t 0 || ! -t 1 ]] || flags+=(--interactive --tty)

exec "${run[@]}" "${flags[@]}" "${extra[@]}" "$IMAGE" "$@"
