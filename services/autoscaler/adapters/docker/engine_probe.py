"""Read the number of cores and the memory of the container engine's machine.

The engine does not report how much memory is available, so this value is unknown.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from services.autoscaler.adapters.docker.engine import Engine
from services.autoscaler.domain.snapshot import Host
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

READ_EVERY_S = 60.0
MIB = 1024 * 1024


class EngineProbe:
    """A :class:`HostProbe` that reads the cores and memory of the engine's machine at most once a minute."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._found: Host | None = None
        self._not_before = float("-inf")

    async def read(self) -> Host | None:
        """Return the machine's cores and memory; None until the engine has answered once."""
        if self._clock() >= self._not_before:
            self._not_before = self._clock() + READ_EVERY_S
            try:
                info = await self._engine.info()
                self._found = Host(float(info["NCPU"]), int(info["MemTotal"]) // MIB, None)
            except (Unavailable, KeyError, ValueError) as error:
                log.warning("the engine's cores and memory cannot be read", extra={"problem": str(error)})
        return self._found
