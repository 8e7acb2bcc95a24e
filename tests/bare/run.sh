#!/bin/sh
# What a new user does, on a machine that has git, make and python3 and nothing else: a container.
#
#   BARE_IMAGE=debian:12   the image; apt-get must work in it
#   BARE_NETWORK=bridge    with `host`, the stack takes other ports, so that one on the host may run
#   BARE_TEST=1            run `make test` too (some minutes)
#   BARE_KEEP=1            leave the container for a look; its name is printed
set -eu

image=${BARE_IMAGE:-debian:12}
network=${BARE_NETWORK:-bridge}
name=tidegate-bare-$$
root=$(cd "$(dirname "$0")/../.." && pwd)

engine=$(command -v docker || command -v podman || true)
if [ -z "$engine" ] || ! "$engine" info >/dev/null 2>&1; then
  echo "Skipped: no container engine (docker, podman) runs here."
  exit 0
fi

say() { printf '\n== %s\n' "$*"; }
inside() { "$engine" exec -w /home/user/tidegate "$name" sh -euc "$1"; }
timed() {
  say "$1"
  began=$(date +%s)
  inside "$1"
  echo "== $1: $(($(date +%s) - began)) s"
}

options=""
for variable in PIP_CERT PIP_INDEX_URL HTTP_PROXY HTTPS_PROXY NO_PROXY; do
  eval "value=\${$variable:-}"
  [ -n "$value" ] && options="$options -e $variable"
done
# A certificate that pip is told to trust must be there under the same name.
[ -n "${PIP_CERT:-}" ] && options="$options -v $PIP_CERT:$PIP_CERT:ro"
gateway=8000
if [ "$network" = host ]; then
  for pair in GATEWAY=18200 GATEWAY_GRPC=18201 REGISTRY=18210 ROUTER=18220 AUTOSCALER=18230 \
    RABBITMQ=18272 EPMD=18274 RABBITMQ_DIST=18275 JOBS=18278 VALKEY=18279; do
    options="$options -e TIDEGATE_${pair%=*}_PORT=${pair#*=}"
  done
  gateway=18200
fi

finish() {
  if [ -n "${BARE_KEEP:-}" ]; then
    echo "The container $name is still there."
  else
    "$engine" rm -f "$name" >/dev/null 2>&1 || true
  fi
}
trap finish EXIT

say "a container of $image with git, make and python3"
# shellcheck disable=SC2086  # options is a list of words
"$engine" run -d --init --shm-size 1g --name "$name" --network "$network" $options "$image" sleep 86400 >/dev/null
"$engine" exec "$name" sh -euc '
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q >/dev/null
  apt-get install -y -q --no-install-recommends git make python3 ca-certificates >/dev/null
  mkdir -p /home/user/tidegate'
git -C "$root" ls-files -z --cached --others --exclude-standard |
  (cd "$root" && tar -c --null --files-from=- --ignore-failed-read) |
  "$engine" exec -i "$name" tar -x -C /home/user/tidegate --no-same-owner
inside 'git init -q . && git add -A'

timed 'make up'
timed 'make up'

say 'a request with nothing but the standard library'
"$engine" exec -i -e "GATEWAY=http://127.0.0.1:$gateway" "$name" python3 - <"$root/tests/bare/request.py"

[ -n "${BARE_TEST:-}" ] && timed 'make test'

timed 'make down'
say 'what still runs'
left=$(inside 'for p in /proc/[0-9]*; do tr "\0" " " <"$p/cmdline" 2>/dev/null || true; echo; done' |
  grep -E 'beam|epmd|valkey|tritonserver|tidegate|services\.' | grep -v sleep || true)
if [ -n "$left" ]; then
  echo "$left"
  exit 1
fi
echo nothing
