"""Probe the database and the artifact store regularly, and delete old versions and unused artifacts."""

from __future__ import annotations

from services.registry.adapters import metrics
from services.registry.adapters.sql.database import RegistryDatabase
from services.registry.application.artifacts import Artifacts
from services.registry.application.deletion import Deletion
from services.registry.application.retention import Retention
from services.registry.application.uploads import Uploads
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.repeating_task import RepeatingTask

log = telemetry.logger(__name__)

COLLECT_EVERY_S = 600.0


class Maintenance:
    """Run two loops: one probes every ``probe_every_s`` seconds, one deletes old data every ten minutes."""

    def __init__(
        self,
        database: RegistryDatabase,
        artifacts: Artifacts,
        uploads: Uploads,
        versions: tuple[Retention, Deletion],
        probe_every_s: float,
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._uploads = uploads
        self._retention, self._deletion = versions
        self._probe_every_s = probe_every_s
        self._probe_loop = RepeatingTask("registry probe", self._probe_step)
        self._collect_loop = RepeatingTask("registry collect", self._collect_step)

    async def start(self) -> None:
        """Probe once, then start the loops."""
        await self.probe()
        self._probe_loop.start(after_s=self._probe_every_s)
        self._collect_loop.start()

    async def stop(self) -> None:
        """Stop the loops."""
        await self._probe_loop.stop()
        await self._collect_loop.stop()

    async def probe(self) -> None:
        """Probe the database and the store for the health check, and set the gauges of stored objects."""
        await self._database.probe()
        await self._artifacts.store.probe()
        try:
            async with self._database.read() as reader:
                metrics.show(await reader.revision(), await reader.totals())
        except TidegateError as error:
            log.warning("totals not read", extra={"problem": error.message})

    async def _probe_step(self) -> float:
        await self.probe()
        return self._probe_every_s

    async def collect(self) -> None:
        """Apply retention, and permanently remove deleted versions, unused artifacts and idle uploads."""
        await self._retention.apply_all()
        await self._deletion.purge()
        await self._artifacts.collect()
        await self._uploads.sweep()

    async def _collect_step(self) -> float:
        await self.collect()
        return COLLECT_EVERY_S
