"""Report to the registry which replicas run, and which artifact each of them may read."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from services.autoscaler.adapters.registry.client import RegistryClient
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError

log = telemetry.logger(__name__)

# The seconds between two reports. Reports are repeated, because the registry forgets them when it restarts.
REPEAT_S = 2.0
# A replica that is being launched may read its artifact for this many seconds, even if the launcher does not
# list the replica yet.
LAUNCH_S = 10.0


class ReplicaGrants:
    """The artifacts that replicas may read, as reported to the registry.

    Each report contains all artifacts. So if a report is lost, the next report repairs this.
    """

    def __init__(self, registry: RegistryClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        self._running: Mapping[str, str] = {}
        self._launching: dict[str, tuple[str, float]] = {}
        self._changed = asyncio.Event()
        self.problem: str | None = None

    def launching(self, replica: str, sha256: str) -> None:
        """Allow a replica to read its artifact. Call this before the replica is launched."""
        self._launching[replica] = (sha256, self._clock() + LAUNCH_S)
        self._changed.set()

    def running(self, artifacts: Mapping[str, str]) -> None:
        """Let only these replicas, and those that are being launched, read their artifacts."""
        if artifacts != self._running:
            self._running = artifacts
            self._changed.set()

    async def run(self) -> None:
        """Report to the registry at each change and every two seconds, until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self._registry.put_replicas(self._current())
                self.problem = None
            except TidegateError as error:
                if self.problem is None:
                    log.warning(
                        "reporting the replicas to the registry failed", extra={"problem": error.message}
                    )
                self.problem = error.message
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REPEAT_S)

    def _current(self) -> dict[str, str]:
        now = self._clock()
        self._launching = {name: each for name, each in self._launching.items() if each[1] > now}
        return {name: sha256 for name, (sha256, _) in self._launching.items()} | dict(self._running)
