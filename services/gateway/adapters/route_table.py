"""Read the route table from the store whenever it changes, and keep a copy on disk for the next start."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import orjson

from services.gateway.domain.routing import RouteTable, parse_table
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

POLL_S = 2.0
RETRY_S = 0.5


class RouteTableCache:
    """A cache of the last valid route table. A failed or empty read changes nothing."""

    def __init__(self, store: Store, disk: Path) -> None:
        self._store = store
        self._disk = disk
        self._task: asyncio.Task[None] | None = None
        self.table: RouteTable | None = None
        # These functions are called with each new table.
        self.on_table: list[Callable[[RouteTable], None]] = []

    async def start(self) -> None:
        """Load the table from disk and then from the store, and start watching the store."""
        with contextlib.suppress(OSError):
            self._take(self._disk.read_bytes(), "disk")
        with contextlib.suppress(StoreUnavailable):
            await self._refresh()
        self._task = asyncio.create_task(self._watch(), name="routes")

    async def stop(self) -> None:
        """Stop watching."""
        await tasks.end(self._task)

    def problem(self) -> str | None:
        """Return why requests cannot be routed; None if they can."""
        return None if self.table is not None else "No route table yet: the router has not published one."

    def deployments(self) -> list[str]:
        """Return the names of all Deployments in the route table."""
        return self.table.deployments() if self.table is not None else []

    async def _watch(self) -> None:
        notices = asyncio.create_task(self._listen(), name="routes notices")
        try:
            while True:
                with contextlib.suppress(StoreUnavailable):
                    await self._refresh()
                await asyncio.sleep(POLL_S)
        finally:
            notices.cancel()

    async def _listen(self) -> None:
        while True:
            try:
                async for _ in self._store.watch_routes():
                    await self._refresh()
            except StoreUnavailable:
                await asyncio.sleep(RETRY_S)

    async def _refresh(self) -> None:
        raw = await self._store.read_routes()
        if raw is not None and self._take(raw, "store"):
            self._disk.parent.mkdir(parents=True, exist_ok=True)
            # Several gateway processes can replace this file at the same moment. So each process first writes
            # a temporary file of its own.
            fresh = self._disk.with_suffix(f".{os.getpid()}")
            fresh.write_bytes(raw)
            fresh.replace(self._disk)

    def _take(self, raw: bytes, source: str) -> bool:
        try:
            head = orjson.loads(raw)
            if self.table is not None and (head["epoch"], head["n"]) <= self.table.revision:
                return False
            table = parse_table(head)
        except (ValueError, KeyError, TypeError) as error:
            log.error("cannot read a route table; keeping the last valid one", extra={"problem": repr(error)})
            return False
        self.table = table
        for take in self.on_table:
            take(table)
        log.info("route table", extra={"revision": list(table.revision), "source": source})
        return True
