"""Write a worker's heartbeat to the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from tidegate.kernel import tasks, telemetry
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)


class ReplicaHeartbeat:
    """Write a worker's report every ``interval_s`` seconds. If the store fails, the worker continues."""

    def __init__(self, store: Store, interval_s: float, report: Callable[[], ReplicaReport]) -> None:
        self._store = store
        self._interval_s = interval_s
        self._report = report
        self._task: asyncio.Task[None] | None = None
        self._failing = False

    def start(self) -> None:
        """Start writing heartbeats."""
        self._task = asyncio.create_task(self._run(), name="heartbeat")

    async def stop(self, *, forget: bool) -> None:
        """Stop writing. Delete the report if ``forget`` is True; otherwise it stays until it expires."""
        await tasks.end(self._task)
        if forget:
            with contextlib.suppress(StoreUnavailable):
                await self._store.forget_replica(self._report().replica)

    async def beat(self) -> None:
        """Write the report now."""
        try:
            await self._store.report_replica(self._report())
            self._failing = False
        except StoreUnavailable as error:
            if not self._failing:
                log.warning(
                    "the store does not answer; the worker continues", extra={"problem": error.message}
                )
            self._failing = True

    async def _run(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(self._interval_s)
