"""The end of every replica of a state folder, for ``tidegate down``."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from services.autoscaler.adapters import procfs
from services.autoscaler.adapters.launcher_process import ProcessLauncher, ProcessPlan

POLL_S = 0.1


async def sweep(state_dir: Path, grace_s: float) -> list[str]:
    """Drain all replicas, wait up to ``grace_s``, then kill what is left; returns the replicas it ended.

    Also finds processes that carry a replica's mark and this state folder but have no folder any more.
    """
    launcher = ProcessLauncher(ProcessPlan(command=[], state_dir=state_dir))
    names = sorted({r.replica for r in await launcher.list()} | procfs.marked_in(state_dir))
    await asyncio.gather(*(launcher.drain(name) for name in names))
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(r.alive for r in await launcher.list()):
        await asyncio.sleep(POLL_S)
    await asyncio.gather(*(launcher.kill(name) for name in names))
    return names
