"""Records of jobs whose message is confirmed say so a moment later, many in one call.

Nobody waits for that: record and message are on disk, which is all that a 202 promises. A job that is taken
before then has moved on; one whose gateway is killed before then is published again by the router's sweeper,
and a worker takes it once.
"""

from __future__ import annotations

import asyncio

from tidegate.kernel import telemetry
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

LINGER_S = 0.025


class QueuedMarker:
    """Collects ids for ``LINGER_S``, then tells the store of all of them."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._ids: list[bytes] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, id_: bytes) -> None:
        """The broker has confirmed the message of this job."""
        self._ids.append(id_)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="queued marks")

    async def stop(self) -> None:
        """Return when the store has been told."""
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
                    "jobs are queued, and their records do not say so yet", extra={"problem": error.message}
                )
        self._task = None
