"""Write to the store how many jobs this process has accepted with a 202. The ledger reads the number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tidegate.kernel import tasks
from tidegate.kernel.store import JobStore, StoreUnavailable

INTERVAL_S = 0.5


class AcknowledgedJobs:
    """A background loop that writes ``total()`` to the store whenever the number has changed."""

    def __init__(self, store: JobStore, incarnation: str, total: Callable[[], int]) -> None:
        self._store = store
        self._incarnation = incarnation
        self._total = total
        self._written = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start writing in the background."""
        self._task = asyncio.create_task(self._run(), name="acknowledged jobs")

    async def stop(self) -> None:
        """Stop, and write the total once more."""
        await tasks.end(self._task)
        await self._write()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._write()

    async def _write(self) -> None:
        total = self._total()
        if total == self._written:
            return
        try:
            await self._store.acknowledged(self._incarnation, total)
            self._written = total
        except StoreUnavailable:
            pass  # the next round writes it
