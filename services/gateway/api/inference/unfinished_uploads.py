"""Track bodies that are not complete, and drop slow ones when memory for bodies is short."""

from __future__ import annotations

import time
from typing import Protocol

from services.gateway.domain.eviction import WATCHED_S, Unfinished, choose
from services.gateway.domain.memory_budget import MemoryBudget

# A scan looks for bodies to drop. Scanning thousands of bodies for each request would block the event loop.
# So a scan looks at SCAN_SIZE bodies at a time, the oldest first, and stops when enough bytes are free. To
# make scans rare, a scan tries to free at least the share LEAST_FREED_SHARE of the memory limit.
SCAN_SIZE = 512
LEAST_FREED_SHARE = 1 / 64


class Upload(Protocol):
    """A connection with a body that is not complete."""

    def unfinished(self) -> Unfinished:
        """Return the progress of the connection's body."""

    def evict(self) -> None:
        """Drop the connection's body, and close the connection."""


class UnfinishedUploads:
    """The connections with an incomplete body of an inference call, oldest first."""

    def __init__(self, bodies: MemoryBudget, bytes_per_s: int) -> None:
        self._bodies = bodies
        self._bytes_per_s = bytes_per_s
        self._all: dict[Upload, None] = {}
        self._not_before = {False: 0.0, True: 0.0}
        bodies.reclaim = self.reclaim

    def add(self, connection: Upload) -> None:
        """Add a connection whose body has begun to arrive."""
        self._all[connection] = None

    def discard(self, connection: Upload) -> None:
        """Remove a connection whose body is complete or abandoned."""
        self._all.pop(connection, None)

    def reclaim(self, need: int, for_known: bool) -> None:
        """Drop incomplete bodies that arrive too slowly, to free at least ``need`` bytes.

        ``for_known``: True if a caller with a valid credential needs the bytes. In this case, if the slow
        bodies do not free enough, bodies of callers without a valid credential are dropped too.
        """
        now = time.monotonic()
        if now < self._not_before[for_known]:
            return
        need = max(need, int(self._bodies.limit * LEAST_FREED_SHARE))
        target = self._bodies.used - need
        for of_unknown in (False, True) if for_known else (False,):
            self._drop(target, of_unknown)
        if self._bodies.used > target:
            self._not_before[for_known] = now + WATCHED_S

    def _drop(self, target: int, of_unknown: bool) -> None:
        connections = list(self._all)
        for begin in range(0, len(connections), SCAN_SIZE):
            need = self._bodies.used - target
            if need <= 0:
                return
            some = connections[begin : begin + SCAN_SIZE]
            unfinished = [each.unfinished() for each in some]
            for at in choose(unfinished, need, self._bytes_per_s, for_known=of_unknown):
                some[at].evict()
