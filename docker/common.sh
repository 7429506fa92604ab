# shellcheck shell=bash
# Sourced by the other scripts. Defines fail, IMAGE (the image's name) and ENGINE (docker or podman);
# both can be given as environment variables.
IMAGE=${IMAGE:-nvidia_rn50}

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

require_image() {
    "$ENGINE" image inspect "$IMAGE" >/dev/null 2>&1 ||
        fail "there is no image $IMAGE: docker/build.sh builds it, docker/load.sh loads it"
}

if [[ -z ${ENGINE:-} ]]; then
    if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
        ENGINE=docker
    elif command -v podman >/dev/null; then
        ENGINE=podman
    elif command -v docker >/dev/null; then
        fail "Docker's daemon does not answer: start it, or join the group docker"
    else
        fail "neither Docker nor Podman is installed"
    fi
fi
