"""Read how busy the cores of this host are. In a container, too, all cores of the host are measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

STAT = Path("/proc/stat")
# The shortest time between two readings, in seconds. The kernel counts CPU time in ticks of 10 ms. In a
# shorter time there are too few ticks for an exact share.
SHORTEST_S = 0.4
_IDLE, _WAITING, _GUESTS = 3, 4, 8


class HostLoad:
    """The share of time in which the host's cores were busy, from one reading to the next."""

    def __init__(self, stat: Path = STAT, clock: Callable[[], float] = time.monotonic) -> None:
        self._stat = stat
        self._clock = clock
        self._last: tuple[float, int, int] | None = None
        self._busy: float | None = None

    def read(self) -> float | None:
        """Return the busy share (0 to 1) since the last reading.

        Return None at the first reading, or if ``/proc/stat`` cannot be read. If the last reading is less
        than ``SHORTEST_S`` old, return its result again.
        """
        now = self._clock()
        if self._last is not None and now - self._last[0] < SHORTEST_S:
            return self._busy
        try:
            first = self._stat.read_text().partition("\n")[0]
            # The fields for guests (virtual machines) are left out, because the field "user" includes their
            # time.
            ticks = [int(word) for word in first.split()[1:]][:_GUESTS]
            idle, total = ticks[_IDLE] + ticks[_WAITING], sum(ticks)
        except (OSError, ValueError, IndexError):
            return None
        if self._last is not None and total > self._last[2]:
            self._busy = min(1.0, max(0.0, 1.0 - (idle - self._last[1]) / (total - self._last[2])))
        self._last = (now, idle, total)
        return self._busy
