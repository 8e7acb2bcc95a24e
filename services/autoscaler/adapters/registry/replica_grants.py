"""Tells the registry which replicas run and which artifact each may read; their tokens open nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from services.autoscaler.adapters.registry.client import RegistryClient
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError

log = telemetry.logger(__name__)

# Said again so often, for a registry that has forgotten it with a restart.
REPEAT_S = 2.0
# How long a replica that is being launched may be missing from the list of those that run.
LAUNCH_S = 10.0


class ReplicaGrants:
    """The set is replaced as a whole and said again and again, so a lost message mends itself."""

    def __init__(self, registry: RegistryClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        self._running: Mapping[str, str] = {}
        self._launching: dict[str, tuple[str, float]] = {}
        self._changed = asyncio.Event()
        self.problem: str | None = None

    def launching(self, replica: str, sha256: str) -> None:
        """Let a replica that is about to start read its artifact."""
        self._launching[replica] = (sha256, self._clock() + LAUNCH_S)
        self._changed.set()

    def running(self, artifacts: Mapping[str, str]) -> None:
        """Let these replicas read their artifacts, and no others."""
        if artifacts != self._running:
            self._running = artifacts
            self._changed.set()

    async def run(self) -> None:
        """Tell the registry at each change, and every two seconds, for ever."""
        while True:
            self._changed.clear()
            try:
                await self._registry.put_replicas(self._current())
                self.problem = None
            except TidegateError as error:
                if self.problem is None:
                    log.warning("the registry did not get the replicas", extra={"problem": error.message})
                self.problem = error.message
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REPEAT_S)

    def _current(self) -> dict[str, str]:
        now = self._clock()
        self._launching = {name: each for name, each in self._launching.items() if each[1] > now}
        return {name: sha256 for name, (sha256, _) in self._launching.items()} | dict(self._running)
