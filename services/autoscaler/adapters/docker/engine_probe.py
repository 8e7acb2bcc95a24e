"""Read the size of the engine's machine from the engine, which does not know what is free."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.autoscaler.adapters.docker.engine import Engine
from services.autoscaler.domain.snapshot import Host
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

AGAIN_AFTER_S = 60.0
MIB = 1024 * 1024


class EngineProbe:
    """A :class:`HostProbe` that asks the engine for the size of its machine, once a minute."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._found: Host | None = None
        self._not_before = float("-inf")

    async def look(self) -> Host | None:
        """Return the size of the engine's machine; None as long as the engine has never said it."""
        if self._clock() >= self._not_before:
            self._not_before = self._clock() + AGAIN_AFTER_S
            try:
                told = await self._engine.info()
                self._found = Host(float(told["NCPU"]), int(told["MemTotal"]) // MIB, None)
            except (Unavailable, KeyError, ValueError) as error:
                log.warning("the size of the engine's machine is not known", extra={"problem": str(error)})
        return self._found
