"""Mark the records of published jobs as queued, many in one call.

Callers do not wait for the mark, because a 202 only means that the record and the message are on disk. If a
worker takes the job before the mark, the mark changes nothing. If the gateway is killed before the mark, the
router publishes the job again, but workers accept it only once.
"""

from __future__ import annotations

import asyncio

from tidegate.kernel import telemetry
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

LINGER_S = 0.025


class QueuedMarker:
    """A collector of the ids of published jobs. Every ``LINGER_S`` seconds, it marks these jobs as queued."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._ids: list[bytes] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, id_: bytes) -> None:
        """Add a job whose message the broker has confirmed."""
        self._ids.append(id_)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="queued marks")

    async def stop(self) -> None:
        """Wait until all marks are written."""
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while self._ids:
            await asyncio.sleep(LINGER_S)
            ids, self._ids = self._ids, []
            try:
                await self._store.queued(ids)
            except StoreUnavailable as error:
                log.info(
                    "jobs are queued, but the store did not record it; the router will publish them again",
                    extra={"problem": error.message},
                )
        self._task = None
