"""The calls whose bodies are still coming in, and what is dropped when memory for bodies is short."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from services.gateway.domain.budget import Budget
from services.gateway.domain.eviction import WATCHED_S, choose

if TYPE_CHECKING:
    from services.gateway.api.direct import DirectProtocol

# To look for bodies to drop takes a look at all of them: more is freed than is needed now.
SHARE = 1 / 32


class Uploads:
    """Every connection with an unfinished body of an inference call."""

    def __init__(self, bodies: Budget, bytes_per_s: int) -> None:
        self._bodies = bodies
        self._bytes_per_s = bytes_per_s
        self._all: set[DirectProtocol] = set()
        self._not_before = {False: 0.0, True: 0.0}
        self.add, self.discard = self._all.add, self._all.discard
        bodies.reclaim = self.reclaim

    def reclaim(self, need: int, for_known: bool) -> None:
        """Drop unfinished bodies that make too little progress, until ``need`` bytes are free.

        ``for_known``: a caller with a credential needs them, so bodies of callers without one go, too.
        """
        now = time.monotonic()
        if now < self._not_before[for_known]:
            return
        connections = list(self._all)
        unfinished = [each.unfinished() for each in connections]
        need = max(need, int(self._bodies.limit * SHARE))
        chosen = choose(unfinished, need, self._bytes_per_s, for_known=for_known)
        for at in chosen:
            connections[at].evict()
        if not chosen:
            self._not_before[for_known] = now + WATCHED_S
