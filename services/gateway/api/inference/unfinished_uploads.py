"""The calls whose bodies are still coming in, and what is dropped when memory for bodies is short."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from services.gateway.domain.eviction import WATCHED_S, choose
from services.gateway.domain.memory_budget import MemoryBudget

if TYPE_CHECKING:
    from services.gateway.api.inference.hot_path import HotPathProtocol

# The oldest bodies are looked at first, so many together, and more is freed than is needed now: to look at
# all of thousands for each request would stop the event loop.
LOOK = 512
SHARE = 1 / 64


class UnfinishedUploads:
    """Every connection with an unfinished body of an inference call, oldest first."""

    def __init__(self, bodies: MemoryBudget, bytes_per_s: int) -> None:
        self._bodies = bodies
        self._bytes_per_s = bytes_per_s
        self._all: dict[HotPathProtocol, None] = {}
        self._not_before = {False: 0.0, True: 0.0}
        bodies.reclaim = self.reclaim

    def add(self, connection: HotPathProtocol) -> None:
        """Remember a connection whose body has begun to come in."""
        self._all[connection] = None

    def discard(self, connection: HotPathProtocol) -> None:
        """Forget a connection whose body is whole or given up."""
        self._all.pop(connection, None)

    def reclaim(self, need: int, for_known: bool) -> None:
        """Drop unfinished bodies that make too little progress, until ``need`` bytes are free.

        ``for_known``: a caller with a credential needs them, so bodies of callers without one go, too.
        """
        now = time.monotonic()
        if now < self._not_before[for_known]:
            return
        need = max(need, int(self._bodies.limit * SHARE))
        wanted = self._bodies.used - need
        for of_unknown in (False, True) if for_known else (False,):
            self._drop(wanted, of_unknown)
        if self._bodies.used > wanted:
            self._not_before[for_known] = now + WATCHED_S

    def _drop(self, wanted: int, of_unknown: bool) -> None:
        connections = list(self._all)
        for begin in range(0, len(connections), LOOK):
            need = self._bodies.used - wanted
            if need <= 0:
                return
            some = connections[begin : begin + LOOK]
            unfinished = [each.unfinished() for each in some]
            for at in choose(unfinished, need, self._bytes_per_s, for_known=of_unknown):
                some[at].evict()
