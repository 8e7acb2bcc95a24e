"""Run the autoscaler or one of its commands.

``sweep`` ends all replicas. ``engine-proxy`` runs the proxy in front of the container engine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

from tidegate.kernel import quick_start

if TYPE_CHECKING:
    from services.autoscaler.settings import AutoscalerSettings


def main(arguments: list[str] | None = None) -> int:
    """Run the service or a command, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.autoscaler")
    commands = parser.add_subparsers(dest="command")
    sweep = commands.add_parser("sweep", help="end all replicas")
    sweep.add_argument(
        "--grace", type=float, default=10.0, help="seconds that workers get to finish their work (default 10)"
    )
    commands.add_parser("engine-proxy", help="run the proxy in front of a container engine")
    parsed = parser.parse_args(arguments)
    quick_start.begin()
    from services.autoscaler.settings import AutoscalerSettings
    from tidegate.kernel import telemetry

    settings = AutoscalerSettings()
    if parsed.command == "sweep":
        return _sweep(settings, parsed.grace)
    telemetry.configure(parsed.command or "autoscaler", settings.log_level)
    # The imports are here, so that each command loads only the modules that it needs.
    if parsed.command == "engine-proxy":
        from services.autoscaler import engine_proxy_wiring

        quick_start.loaded()
        engine_proxy_wiring.run(settings)
        return 0
    from services.autoscaler.app import build
    from tidegate.kernel.service import app as service

    service.run(build(settings), settings, settings.autoscaler_port)
    return 0


def _sweep(settings: AutoscalerSettings, grace_s: float) -> int:
    """End all replicas and return 0. Return 1 if an autoscaler is running, or if a process does not die."""
    from services.autoscaler.adapters.leader_lock import LeaderLock
    from services.autoscaler.adapters.process import procfs
    from services.autoscaler.application.end_replicas import end_replicas
    from services.autoscaler.launcher_wiring import launcher_of
    from tidegate.kernel.errors import Unavailable

    leader = LeaderLock(settings.state_path / "run" / "autoscaler.lock")
    if not leader.try_take():
        print(
            f"Stop the autoscaler first: process {leader.holder()} would start the replicas again.",
            file=sys.stderr,
        )
        return 1
    strays = procfs.marked_in(settings.state_path) if settings.launcher == "process" else set()
    try:
        ended = asyncio.run(end_replicas(launcher_of(settings)[0], grace_s, strays))
    except Unavailable as error:
        print(error.message, file=sys.stderr)
        return 1
    finally:
        leader.release()
    print(f"Ended {len(ended)} replicas." if ended else "No replica was running.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
