#!/bin/sh
# Run a stack in the edge profile where there is no network but loopback: start, serve, a job, stop.
#
# It needs `unshare` (util-linux) as root, or user namespaces. What is installed is used; nothing is fetched.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
if [ "${1:-}" != inside ]; then
  options=-n
  [ "$(id -u)" = 0 ] || options=-rn
  if ! unshare $options true 2>/dev/null; then
    echo "Skipped: this machine makes no network namespaces (unshare $options)."
    exit 0
  fi
  exec unshare $options "$0" inside
fi

ip link set lo up
routes=$(ip route show)
[ -z "$routes" ] || { echo "There is a route: $routes"; exit 1; }
state=$(mktemp -d)
export TIDEGATE_STATE_DIR="$state/state" TIDEGATE_CONFIG_DIR="$state/config" NO_COLOR=1
export TIDEGATE_RUNTIME_DIR="${TIDEGATE_RUNTIME_DIR:-$root/.tidegate/runtime}" PYTHONPATH="$root"
tidegate() { (cd "$root" && .venv/bin/python -P -m tidegate.cli "$@"); }
trap 'tidegate down >/dev/null 2>&1 || true; rm -rf "$state"' EXIT

tidegate up --profile edge --example
pixels=$(seq -s, 1 64 | sed 's/[0-9][0-9]*/0/g')
body="{\"model\":\"digits\",\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"shape\":[1,64],\"data\":[$pixels]}]}"
job=$(curl -sf http://127.0.0.1:8000/v1/jobs -H 'Content-Type: application/json' -d "$body" | sed 's/.*"id":"\([0-9a-f]*\)".*/\1/')
tidegate job "$job" --wait
tidegate status
tidegate down
echo "Without a route: started, answered, ran a job, stopped."
