"""Report to the store how a replica has spent its time. The autoscaler reads the reports."""

from __future__ import annotations

import asyncio
import contextlib

from services.worker.domain.time_ledger import TimeLedger
from tidegate.kernel import tasks
from tidegate.kernel.protocol.replica_time import ReplicaTime
from tidegate.kernel.store import Store, StoreUnavailable

EVERY_S = 1.0
PARTS_A_SECOND = 200


class TimeReport:
    """Write to the store how a replica has spent its time.

    A report contains the total time of each use since the replica's start. Uses are, for example, the calls
    for one caller, or idle time. A report is written once a second, but less often if it contains many
    callers. If the store does not answer, nothing is lost, because the next report contains the totals again.
    """

    def __init__(self, store: Store, replica: str, deployment: str) -> None:
        self._store = store
        self._replica = replica
        self._deployment = deployment
        self._ledger: TimeLedger | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, ledger: TimeLedger) -> None:
        """Start reporting the times of ``ledger``."""
        self._ledger = ledger
        self._task = asyncio.create_task(self._run(ledger), name="time report")

    async def stop(self) -> None:
        """Write the last report, and stop."""
        await tasks.end(self._task)
        if self._ledger is not None:
            await self._write(self._ledger, ended=True)

    async def _run(self, ledger: TimeLedger) -> None:
        while True:
            parts = await self._write(ledger)
            # The report of many callers is long, so it is written less often.
            await asyncio.sleep(EVERY_S * (1 + parts // PARTS_A_SECOND))

    async def _write(self, ledger: TimeLedger, *, ended: bool = False) -> int:
        parts, open_ns = ledger.parts()
        with contextlib.suppress(StoreUnavailable):
            await self._store.report_time(
                ReplicaTime(self._replica, self._deployment, open_ns, ended, parts, ledger.calls_ns)
            )
        return len(parts)
