"""``python -m benchmarks.request_path``: print the files that one small request runs through, in order.

A gateway and a worker run under a profiler. A file is printed only if it runs in each of several
requests, because files of background tasks run only in some.
"""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from pathlib import Path

from benchmarks import places, session, stack, workloads
from benchmarks.errors import BenchmarkFailed
from benchmarks.model import ensure_digits
from tidegate.stack import processes

REQUESTS = 8
SERVICES = ("gateway", "worker")
LIMIT_S = 20.0
TRACER = places.HERE / "tracer"


def main() -> int:
    """Trace the requests, print the files."""
    with session.session():
        ensure_digits()
        traces = places.work_dir("traces")
        traces.mkdir(parents=True, exist_ok=True)
        with stack.tidegate(
            "request-path", {"PYTHONPATH": str(TRACER), "TRACE_FOLDER": str(traces)}
        ) as running:
            running.deploy(workloads.onnx_model(), "digits")
            _ask(running)
            found = {service: _traced(running, service, traces) for service in SERVICES}
    total = 0
    for service, files in found.items():
        total += len(files)
        print(f"\n{service}, {len(files)} files")
        for file in files:
            print(f"  {file}")
    print(f"\n{len({file for files in found.values() for file in files})} files, {total} with those in both")
    return 0


def _traced(running: stack.Stack, service: str, traces: Path) -> list[str]:
    """Return the files of a service that run for every request, by their first call."""
    runs = []
    pid = _pid(running, service)
    for _ in range(REQUESTS):
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.02)
        _ask(running)
        os.kill(pid, signal.SIGUSR2)
        runs.append(_files(traces / f"{pid}.json"))
    everywhere = set(runs[0]).intersection(*runs[1:])
    return [file for file in runs[0] if file in everywhere]


def _pid(running: stack.Stack, service: str) -> int:
    # A worker's command line has arguments after the name of its module.
    word = f" services.{service} "
    found = [p.pid for p in processes.marked(running.state) if word in f"{p.command(limit=None)} "]
    if len(found) != 1:
        raise BenchmarkFailed(f"{len(found)} processes of services.{service}, expected one")
    return found[0]


def _ask(running: stack.Stack) -> None:
    exchange = workloads.exchange("digits", "oip")
    request = urllib.request.Request(
        running.url + exchange.path, data=exchange.body, headers=exchange.headers
    )
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        answer.read()
    time.sleep(0.02)


def _files(path: Path) -> list[str]:
    """Wait until a recording is written. Return its project files, and delete it."""
    end = time.monotonic() + LIMIT_S
    while not path.exists():
        if time.monotonic() > end:
            raise BenchmarkFailed(f"the recording {path.name} was not written")
        time.sleep(0.01)
    files = json.loads(path.read_text())
    path.unlink()
    root = f"{places.ROOT}/"
    return [
        file.removeprefix(root) for file in files if file.startswith((f"{root}services", f"{root}tidegate"))
    ]


if __name__ == "__main__":
    session.run(main)
