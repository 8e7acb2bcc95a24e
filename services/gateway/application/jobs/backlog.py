"""Estimate how many jobs of a Deployment are queued, and when the next one would start."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from services.gateway.domain.admission import predicted_wait_ms
from services.gateway.domain.replica_fleet import ReplicaFleet
from tidegate.kernel.protocol.jobs import JobLoad
from tidegate.kernel.store import StoreUnavailable

FRESH_S = 0.5
STALE_S = 2.0


class BacklogEstimate:
    """Estimate how many jobs of each Deployment are queued.

    The estimate is the last number that ``read`` returned from the store, plus the jobs that this gateway has
    accepted since then. It does not include the jobs that other gateways have accepted since then.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Mapping[str, JobLoad]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._clock = clock
        self._loads: Mapping[str, JobLoad] = {}
        self._since: Counter[str] = Counter()
        # `_refresh` moves the counts of `_since` to this counter while it reads the store. After the read,
        # `_loads` includes these jobs, so the counter is emptied. If the read fails, the counts go back to
        # `_since`.
        self._before_reading: Counter[str] = Counter()
        self._at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def ahead(self, deployment: str) -> int | None:
        """Count a new job. Return how many queued jobs are ahead of it, or None if unknown."""
        age = self._clock() - self._at
        if age > FRESH_S and self._reading is None:
            self._reading = asyncio.create_task(self._refresh(), name="waiting jobs")
        if age > STALE_S and self._reading is not None:
            await asyncio.shield(self._reading)
        if self._clock() - self._at > 2 * STALE_S:
            return None
        load = self._loads.get(deployment)
        ahead = load.waiting if load is not None else 0
        ahead += self._before_reading[deployment] + self._since[deployment]
        self._since[deployment] += 1
        return ahead

    async def _refresh(self) -> None:
        self._before_reading, self._since = self._since, Counter()
        try:
            self._loads = await self._read()
            self._at = self._clock()
        except StoreUnavailable:
            self._since += self._before_reading
        finally:
            self._before_reading = Counter()
            self._reading = None


def estimated_start_ms(position: int, fleet: ReplicaFleet) -> float | None:
    """Return the milliseconds until a job starts; None if unknown.

    ``position``: the number of jobs ahead of the job.
    """
    if fleet.ready == 0:
        return fleet.start_ms
    return predicted_wait_ms(position, fleet)
