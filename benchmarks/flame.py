"""``python -m benchmarks.flame``: draw flame graphs of gateway and worker under W2.

py-spy samples both while 64 connections send requests for digits. For each picture, a table lists the
functions with the most samples of their own. These are the widest tops of the flame graph.
"""

from __future__ import annotations

import argparse
import subprocess
from collections import Counter
from pathlib import Path

from benchmarks import load, options, places, report, session, stack, workloads
from benchmarks.errors import BenchmarkFailed
from benchmarks.model import ensure_digits
from tidegate.stack import processes

RATE_HZ = 400
TOP = 14


def main() -> int:
    """Record both, write the pictures, print the tables."""
    chosen = _arguments()
    spy = places.environment(places.PLOT) / "bin" / "py-spy"
    if not spy.exists():
        raise BenchmarkFailed(f"py-spy is missing: python -m benchmarks.install --only {places.PLOT}")
    with session.session(), stack.tidegate("flame") as running:
        ensure_digits()
        running.deploy(workloads.onnx_model(), "digits")
        exchange = workloads.exchange("digits", "oip")
        load.warm(running.url, exchange, chosen.connections)
        for service in ("gateway", "worker"):
            print(f"sampling the {service} for {chosen.seconds} s", flush=True)
            pid = _pid(running, service)
            under = load.Load(running.url, exchange, chosen.connections, chosen.seconds + 4)
            try:
                stacks = _record(spy, pid, chosen.out / f"flame-{service}", chosen.seconds)
            finally:
                under.stop()
            print(f"\n{service}, samples on the function itself\n\n{_table(stacks)}\n")
    return 0


def _pid(running: stack.Stack, service: str) -> int:
    module = f"services.{service}"
    found = [p.pid for p in processes.marked(running.state) if f" {module}" in p.command(limit=None)]
    if len(found) != 1:
        raise BenchmarkFailed(f"{len(found)} processes of {module}, expected one")
    return found[0]


def _record(spy: Path, pid: int, out: Path, seconds: int) -> str:
    """Return the stacks in the collapsed form, one a line with its count. Write the picture ``out``.svg."""
    out.parent.mkdir(parents=True, exist_ok=True)
    common = [str(spy), "record", "--pid", str(pid), "--nonblocking", "--rate", str(RATE_HZ)]
    half = max(1, seconds // 2)
    raw = out.with_suffix(".txt")
    for form, target in (("flamegraph", out.with_suffix(".svg")), ("raw", raw)):
        command = [*common, "--duration", str(half), "--format", form, "--output", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchmarkFailed(f"py-spy: {done.stderr.strip()[-500:]}")
        # The picture's title is the command, which contains paths of this machine.
        target.write_text(target.read_text().replace(" ".join(command), f"{out.name}, {half} s"))
    return raw.read_text()


def _table(stacks: str) -> str:
    own: Counter[str] = Counter()
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        # The line number within the function does not matter here.
        own[frames.rpartition(";")[2].partition(":")[0] + ")"] += int(count)
    total = sum(own.values())
    rows = [[name, f"{count / total:.1%}"] for name, count in own.most_common(TOP)]
    return report.table(["function", "of the samples"], rows)


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=16)
    parser.add_argument("--connections", type=int, default=64, help="concurrent connections (default: 64)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
