"""``python -m benchmarks.install``: one virtual environment for each peer.

Environments that match their lock file are not changed. If a peer cannot be installed, that is reported, and
the others are still installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from benchmarks import places
from deploy.bootstrap import environments
from deploy.bootstrap.command import Runner
from deploy.bootstrap.paths import Paths
from deploy.bootstrap.step import Report, StepFailed

WRK_MISSING = "wrk, the load generator, is missing: sudo apt-get install wrk"


def installable() -> list[str]:
    """Return every environment that has a lock file: those of the peers and of the charts."""
    return [*sorted(lock.parent.name for lock in places.PEERS.glob("*/requirements.lock")), places.PLOT]


def installed(name: str) -> bool:
    """Return True if the environment matches its lock."""
    return environments.filled(places.environment(name), places.lock(name), _stamp(name))


def install(name: str, runner: Runner) -> None:
    """Make the environment and install its packages. Raise StepFailed, with what to do."""
    env = places.environment(name)
    here = Paths(places.ROOT, Path(sys.prefix), places.runtime_dir())
    log = places.bench_dir() / "log" / f"install-{name}.log"
    environments.create(here, env, runner, log=log, pip=False)
    environments.install(here, env, places.lock(name), _stamp(name), runner, log, _one_line(name))
    if not environments.filled(env, places.lock(name), _stamp(name)):
        raise StepFailed(f"{name}: pip left out packages of the lock.", f"Read {log}.", log)


def _stamp(name: str) -> Path:
    return places.environment(name) / ".stamp"


def _one_line(name: str) -> Report:
    """Return a report of progress in one line, drawn again in place; without a terminal it shows nothing."""
    width = shutil.get_terminal_size().columns - 1

    def report(detail: str) -> None:
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{f'  ..  {name}: {detail}'[:width]}", end="\r", flush=True)

    return report


def main() -> int:
    """Install what is missing. Return 1 if an installation failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=installable(), metavar="PEER", help="install only these")
    only: list[str] | None = parser.parse_args().only
    names = only or installable()
    runner, failed = Runner(), []
    try:
        for number, name in enumerate(names, start=1):
            began, head = time.monotonic(), f"[{number}/{len(names)}] {name}"
            if installed(name):
                print(f"{head}: is there")
                continue
            print(f"{head}: installing")
            try:
                install(name, runner)
                print(f"{head}: installed in {time.monotonic() - began:.0f} s")
            except StepFailed as failure:
                failed.append(name)
                print(f"{head}: FAILED. {failure.what}\n  {failure.remedy}\n  Log: {failure.log}")
    except KeyboardInterrupt:
        runner.end()
        return 130
    if only is None and shutil.which("wrk", path=os.environ.get("PATH")) is None:
        print(WRK_MISSING)
        failed.append("wrk")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
