"""The leading router's lease. It is on disk, beside the jobs, so a restart of the store keeps it.

Each new lease has a greater epoch than all earlier ones. The leader sends its epoch with everything that it
writes elsewhere. Writes with an older epoch are ignored, so a former leader cannot overwrite the work of its
successor.
"""

from __future__ import annotations

from typing import NamedTuple

from redis.asyncio import Redis

from tidegate.kernel.store.connection import Connected
from tidegate.kernel.store.scripts import Scripts


class LeaderLease(NamedTuple):
    """The leader's lease in the store. It ends after ``lasts_s`` seconds unless ``holder`` renews it."""

    holder: str
    epoch: int
    lasts_s: float


class LeaderStore(Connected):
    """Typed access to the leader's lease. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._scripts = Scripts(redis)

    async def claim(self, candidate: str, lease_s: float, seen: int, dead: str = "") -> LeaderLease:
        """Take the lease if it is free, or renew it if ``candidate`` holds it. Return the current lease.

        ``seen``: the highest epoch that ``candidate`` has seen. A new lease gets a greater epoch. ``dead``:
        the name of a holder that has ended. If this holder has the lease, the lease is treated as free.
        """
        holder, epoch, lasts_ms = await self._scripts.run("lead", [candidate, int(lease_s * 1e3), seen, dead])
        return LeaderLease(holder.decode(), epoch, max(0, lasts_ms) / 1e3)

    async def resign(self, candidate: str) -> None:
        """End the lease immediately if ``candidate`` holds it."""
        await self._scripts.run("resign", [candidate])
