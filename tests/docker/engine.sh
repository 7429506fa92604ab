#!/usr/bin/env bash
# Run a command with a Docker engine: tests/docker/engine.sh COMMAND...
#
# An engine that runs already is used. Otherwise, for root on Debian, one is installed from the
# distribution's packages, started in a directory of its own and stopped at the end; it changes no
# network settings and needs no image registry: TEST_BASE_IMAGE, which the tests build on, is made
# of packages too. Where none of this is possible the command runs without, and its tests say why
# they are skipped.
#
# ENGINE_ROOT keeps the engine's files and the base image for the next time.
set -euo pipefail

say() { echo "engine.sh: $*" >&2; }

if docker info >/dev/null 2>&1; then
    exec "$@"
fi
# shellcheck source=/dev/null
source /etc/os-release
if [[ $(id -u) != 0 || $ID != debian ]]; then
    say "no Docker engine answers, and one can be installed here only as root on Debian"
    exec "$@"
fi

install_packages() {
    local policy=/usr/sbin/policy-rc.d status=0
    [[ ! -x /usr/sbin/dockerd || ! -x /usr/bin/mmdebstrap ]] || return 0
    if [[ ! -e $policy ]]; then # keeps the package from starting a second engine
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
        policy_is_ours=yes
    fi
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends docker.io mmdebstrap >/dev/null || status=1
    [[ ! ${policy_is_ours:-} ]] || rm -f "$policy"
    return $status
}

if ! install_packages; then
    say "no Docker engine answers, and its packages could not be installed"
    exec "$@"
fi

directory=${ENGINE_ROOT:-$(mktemp -d)}
mkdir -p "$directory"
export DOCKER_HOST=unix://$directory/docker.sock
export PATH=/usr/bin:$PATH # the client that belongs to the engine
stop() {
    kill "$engine" 2>/dev/null || true
    wait "$engine" || true
    [[ ${ENGINE_ROOT:-} ]] || rm -rf "$directory"
}
# containers share the host's network: neither a bridge nor iptables rules
dockerd --host "$DOCKER_HOST" --data-root "$directory/data" --exec-root "$directory/exec" \
    --pidfile "$directory/docker.pid" --iptables=false --ip6tables=false --ip-forward=false \
    --bridge=none --oom-score-adjust 0 --storage-driver=overlay2 >"$directory/dockerd.log" 2>&1 </dev/null &
engine=$!
trap stop EXIT
for _ in {1..60}; do
    docker info >/dev/null 2>&1 && break
    kill -0 "$engine" 2>/dev/null || break
    sleep 0.5
done
if ! docker info >/dev/null 2>&1; then
    say "the Docker engine did not start: $(tail -n 1 "$directory/dockerd.log")"
    unset DOCKER_HOST
    "$@"
    exit
fi

export TEST_BASE_IMAGE=local/debian-python:$VERSION_CODENAME
if ! docker image inspect "$TEST_BASE_IMAGE" >/dev/null 2>&1; then
    # The certificates of the host, for networks that bring their own.
    bundle=/etc/ssl/certs/ca-certificates.crt
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-pip \
        --customize-hook="copy-in $bundle /etc/ssl/certs" "$VERSION_CODENAME" |
        docker import --change "ENV PIP_CERT=$bundle SSL_CERT_FILE=$bundle" - "$TEST_BASE_IMAGE" >/dev/null
fi
"$@"
