"""The registry's own upkeep: probes of database and artifact store, and removal of unused artifacts."""

from __future__ import annotations

import asyncio

from services.registry.adapters import metrics
from services.registry.adapters.sql.database import RegistryDatabase
from services.registry.application.artifacts import Artifacts
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import TidegateError

log = telemetry.logger(__name__)

COLLECT_EVERY_S = 600.0


class Maintenance:
    """Two loops: probe every ``probe_every_s`` seconds, collect artifacts every ten minutes."""

    def __init__(self, database: RegistryDatabase, artifacts: Artifacts, probe_every_s: float) -> None:
        self._database = database
        self._artifacts = artifacts
        self._probe_every_s = probe_every_s
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Probe once, then start the loops."""
        await self.probe()
        self._tasks = [
            asyncio.create_task(self._probe_loop(), name="registry probe"),
            asyncio.create_task(self._collect_loop(), name="registry collect"),
        ]

    async def stop(self) -> None:
        """Stop the loops."""
        await tasks.end(*self._tasks)

    async def probe(self) -> None:
        """Probe database and store for the health check, and set the gauges of what is stored."""
        await self._database.probe()
        await self._artifacts.store.probe()
        try:
            async with self._database.read() as reader:
                metrics.show(await reader.revision(), await reader.totals())
        except TidegateError as error:
            log.warning("totals not read", extra={"problem": error.message})

    async def _probe_loop(self) -> None:
        while True:
            await asyncio.sleep(self._probe_every_s)
            await self.probe()

    async def _collect_loop(self) -> None:
        while True:
            await self._artifacts.collect()
            await asyncio.sleep(COLLECT_EVERY_S)
