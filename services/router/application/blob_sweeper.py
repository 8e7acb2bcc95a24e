"""Takes expired payloads out of the blob store, every minute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import Counter

from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

SWEPT = Counter("tidegate_router_blob_folders_swept_total", "Folders of expired payloads deleted.")


class BlobSweeper:
    """One of the router's loops; only the router that leads sweeps."""

    def __init__(self, blobs: Blobs, interval_s: float, *, leads: Callable[[], bool]) -> None:
        self._blobs = blobs
        self._interval_s = interval_s
        self._leads = leads
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="sweeper")

    async def stop(self) -> None:
        """End."""
        await tasks.end(self._task)
        self._blobs.close()

    async def _run(self) -> None:
        while True:
            try:
                if self._leads():
                    SWEPT.inc(await self._blobs.sweep(time.time()))
            except Unavailable as error:
                log.warning("expired payloads were not swept", extra={"problem": error.message})
            await asyncio.sleep(self._interval_s)
