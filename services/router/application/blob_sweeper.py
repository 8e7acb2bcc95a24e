"""Delete expired payloads from the blob store at a fixed interval."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import Counter

from tidegate.kernel import telemetry
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.repeating_task import RepeatingTask

log = telemetry.logger(__name__)

SWEPT = Counter("tidegate_router_blob_folders_swept_total", "Folders of expired payloads deleted.")


class BlobSweeper:
    """One of the router's loops. It deletes expired payloads while this router leads."""

    def __init__(self, blobs: Blobs, interval_s: float, *, leads: Callable[[], bool]) -> None:
        self._blobs = blobs
        self._interval_s = interval_s
        self._leads = leads
        self._loop = RepeatingTask("blob sweeper", self._step)

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop, and close the blob store."""
        await self._loop.stop()
        self._blobs.close()

    async def _step(self) -> float:
        try:
            if self._leads():
                SWEPT.inc(await self._blobs.sweep(time.time()))
        except Unavailable as error:
            log.warning("expired payloads were not swept", extra={"problem": error.message})
        return self._interval_s
