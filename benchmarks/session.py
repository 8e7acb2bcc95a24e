"""Run one benchmark at a time, and stop all its processes however it ends."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import places
from benchmarks.errors import BenchmarkFailed
from tidegate.stack import processes
from tidegate.stack.errors import StackError
from tidegate.stack.processes import Process

MARK = "TIDEGATE_BENCH"
"""In the environment of every process of a benchmark; its value is the benchmarks' folder."""

GRACE_S = 3.0


class Busy(BenchmarkFailed):
    """Another benchmark uses the folder."""


@contextmanager
def session() -> Iterator[None]:
    """Lock the benchmarks' folder. Stop processes that a killed run left, and at the end those of this run.

    SIGTERM ends the block like Ctrl-C.
    """
    folder = places.bench_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"Another benchmark runs in {folder}; TIDEGATE_BENCH_DIR names another folder."
            ) from None
        os.environ[MARK] = str(folder)
        signal.signal(signal.SIGTERM, _interrupt)
        sweep()
        try:
            yield
        finally:
            sweep()


def sweep() -> list[Process]:
    """End every process of a benchmark in this folder except the calling one. Return them."""
    mark, own = str(places.bench_dir()), os.getpid()
    found = (processes.find(int(entry.name)) for entry in processes.PROC.iterdir() if entry.name.isdigit())
    marked = [p for p in found if p and p.pid != own and p.environment().get(MARK) == mark]
    processes.stop(marked, GRACE_S)
    return marked


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def run(main: Any) -> None:
    """Run a benchmark's ``main`` and exit with its code. Errors that a user can cause have no traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; everything that was started is stopped", file=sys.stderr)
        sys.exit(130)
    except (BenchmarkFailed, StackError) as failure:
        sys.exit(str(failure))
