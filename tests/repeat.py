"""``python -m tests.repeat``: run `make test` several times, each in a fresh clone.

A test that fails because the machine is slow or busy is a defect. So ``--busy`` runs loops beside the tests,
and ``--cores`` limits the cores that they may use (by CPU affinity). A red run names its failed tests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 90 * 60
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_COUNTS = re.compile(r"^(?:=+ )?((?:\d+ \w+, )*\d+ (?:passed|failed|errors?)[^=\n]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Run:
    """The outcome of one `make test`."""

    code: int
    seconds: float
    counts: list[str]
    failed: list[str]


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """Run this many processes that only use the CPU."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def run(source: Path, folder: Path, cores: int | None, log: Path) -> Run:
    """Clone ``source`` into ``folder`` and run its tests there."""
    subprocess.run(["git", "clone", "--quiet", str(source), str(folder)], check=True)
    pinned = ["taskset", "--cpu-list", f"0-{cores - 1}"] if cores else []
    began = time.monotonic()
    with log.open("wb") as out:
        tests = subprocess.Popen(
            [*pinned, "bash", ".ci/run"], cwd=folder, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, env={**os.environ, "CI": "true"}, start_new_session=True,
        )  # fmt: skip
        try:
            code = tests.wait(LIMIT_S)
        finally:
            if tests.poll() is None:
                os.killpg(tests.pid, signal.SIGTERM)
                tests.wait()
    text = log.read_text(errors="replace")
    return Run(code, time.monotonic() - began, _COUNTS.findall(text), _FAILED.findall(text))


def main() -> int:
    """Run and print one line per run; return 1 if any failed."""
    parser = argparse.ArgumentParser(prog="tests.repeat", description="`make test`, in fresh clones.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--busy", type=int, default=0, help="processes that only use the CPU, beside the tests"
    )
    parser.add_argument("--cores", type=int, help="cores that the tests may use; default: all")
    parser.add_argument("--logs", type=Path, help="folder for the runs' output; default: a temporary one")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a kill ends the busy loops too
    logs = given.logs or Path(tempfile.mkdtemp(prefix="tidegate-repeat-"))
    logs.mkdir(parents=True, exist_ok=True)
    print(f"{given.runs} runs, {given.busy} busy loops, {given.cores or 'all'} cores; output in {logs}")
    red = 0
    for number in range(1, given.runs + 1):
        folder = Path(tempfile.mkdtemp(prefix="tidegate-clone-"))
        folder.chmod(0o755)  # the sandbox's user must reach the clone, or some tests are skipped
        try:
            with busy(given.busy):
                found = run(Path.cwd(), folder / "tidegate", given.cores, logs / f"run-{number}.log")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        red += found.code != 0
        word = "green" if found.code == 0 else f"RED ({', '.join(found.failed) or f'exit code {found.code}'})"
        print(f"run {number}: {word}, {found.seconds:.0f} s; {'; '.join(found.counts)}", flush=True)
    print(f"{given.runs - red} of {given.runs} runs green")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
