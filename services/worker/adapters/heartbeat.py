"""A worker's heartbeat in the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from tidegate.kernel import tasks, telemetry
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)


class Heartbeat:
    """Reports every ``interval_s``, and at once when told to. A store that is away changes nothing else."""

    def __init__(self, store: Store, interval_s: float, report: Callable[[], ReplicaReport]) -> None:
        self._store = store
        self._interval_s = interval_s
        self._report = report
        self._task: asyncio.Task[None] | None = None
        self._away = False

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="heartbeat")

    async def stop(self, *, forget: bool) -> None:
        """End; ``forget`` takes the report away, otherwise it stays until it expires."""
        await tasks.end(self._task)
        if forget:
            with contextlib.suppress(StoreUnavailable):
                await self._store.forget_replica(self._report().replica)

    async def beat(self) -> None:
        """Report now."""
        try:
            await self._store.report_replica(self._report())
            self._away = False
        except StoreUnavailable as error:
            if not self._away:
                log.warning("the store is away; working on", extra={"problem": error.message})
            self._away = True

    async def _run(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(self._interval_s)
