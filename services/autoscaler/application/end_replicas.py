"""End all replicas of a launcher, for ``tidegate down`` and the end of the compose stack."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from services.autoscaler.domain.launcher import Launcher

POLL_S = 0.1


async def end_replicas(launcher: Launcher, grace_s: float, strays: Collection[str] = ()) -> list[str]:
    """Drain all replicas, wait at most ``grace_s`` seconds, kill them, and return their names.

    ``strays`` are replicas that the launcher no longer lists, but whose processes may still run.
    """
    names = sorted({r.replica for r in await launcher.list()} | set(strays))
    await asyncio.gather(*(launcher.drain(name) for name in names))
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(r.alive for r in await launcher.list()):
        await asyncio.sleep(POLL_S)
    await asyncio.gather(*(launcher.kill(name) for name in names))
    return names
