#!/bin/sh
# NVIDIA's perf_analyzer, unmodified, against the running gateway: over HTTP and over gRPC.
#
#   benchmarks/perf_analyzer.sh MODEL [perf_analyzer's own options, e.g. --concurrency-range 1:64:4]
#
# The binary comes from the wheel tritonclient 2.46.0, the last that has it, once, into TIDEGATE_BENCH_DIR. It
# needs Debian's libb64-0d; its CUDA runtime is the one that Triton's wheel brought.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
state=${TIDEGATE_STATE_DIR:-$root/.tidegate}
runtime=${TIDEGATE_RUNTIME_DIR:-$state/runtime}
home=${TIDEGATE_BENCH_DIR:-$state/bench}/perf_analyzer
host=${TIDEGATE_HOST:-127.0.0.1}
wheel_sha256=10d2cda89b72599757ef5aeab160c39c6dead64a97871c6156cdf25043f2f655

[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1
shift

if [ ! -x "$home/perf_analyzer" ]; then
    fetch=$(mktemp -d)
    trap 'rm -rf "$fetch"' EXIT
    "$root/.venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$fetch" \
        --only-binary :all: --platform manylinux1_x86_64 tritonclient==2.46.0
    echo "$wheel_sha256  $(ls "$fetch"/*.whl)" | sha256sum --check --quiet
    mkdir -p "$home/lib"
    "$root/.venv/bin/python" -m zipfile -e "$fetch"/*.whl "$fetch/wheel"
    install -m 755 "$fetch"/wheel/*.data/data/bin/perf_analyzer "$home/perf_analyzer"
fi
for library in "$runtime"/triton/nvidia_pytriton.libs/libcudart-*.so.12*; do
    ln -sf "$library" "$home/lib/libcudart.so.12"
done
export LD_LIBRARY_PATH="$home/lib"
if ldd "$home/perf_analyzer" | grep -q 'libb64.*not found'; then
    echo "perf_analyzer needs libb64: sudo apt-get install libb64-0d" >&2
    exit 1
fi

run() {
    echo "== $1, $2"
    door=$1 address=$2
    shift 2
    "$home/perf_analyzer" -m "$model" -u "$address" -i "$door" "$@" || failed=$?
}

failed=0
run http "$host:${TIDEGATE_GATEWAY_PORT:-8000}" "$@"
run grpc "$host:${TIDEGATE_GATEWAY_GRPC_PORT:-8001}" "$@"
exit "$failed"
