"""How many jobs this process has told a caller of, for the ledger: the store is told of it now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tidegate.kernel import tasks
from tidegate.kernel.store import JobStore, StoreUnavailable

INTERVAL_S = 0.5


class AcknowledgedJobs:
    """Writes ``total()`` under this incarnation whenever it has grown."""

    def __init__(self, store: JobStore, incarnation: str, total: Callable[[], int]) -> None:
        self._store = store
        self._incarnation = incarnation
        self._total = total
        self._told = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Go on in the background."""
        self._task = asyncio.create_task(self._run(), name="tally")

    async def stop(self) -> None:
        """Tell the last of it."""
        await tasks.end(self._task)
        await self._tell()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._tell()

    async def _tell(self) -> None:
        total = self._total()
        if total == self._told:
            return
        try:
            await self._store.acknowledged(self._incarnation, total)
            self._told = total
        except StoreUnavailable:
            pass  # next time
