"""Learn from the kernel when a worker's process ends.

A pidfd is a file descriptor of a process. It becomes readable when the process ends, even if another
autoscaler started the process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


class ProcessEnds:
    """The times at which workers' processes ended, read from ``clock``.

    Use this class only in the event loop.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._watched: dict[str, int] = {}  # the pidfd of each replica
        self._ended: dict[str, float] = {}

    def watch(self, replica: str, pid: int) -> None:
        """Begin to watch a replica's process for its end, unless it is watched already."""
        if replica in self._watched or replica in self._ended:
            return
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:  # the process has ended, or no descriptor is free. Then `ended_at` returns None
            return
        self._watched[replica] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._note, replica)

    def ended_at(self, replica: str) -> float | None:
        """Return the time when a replica's process ended; None if the process was not watched.

        The calling code must know that the process has ended. If no time is stored yet, this method stores
        the current time and returns it.
        """
        if replica in self._watched:  # the process has ended, but the event loop has not called `_note`
            self._note(replica)
        return self._ended.get(replica)

    def forget(self, replica: str) -> None:
        """Stop watching a removed replica, and forget when it ended."""
        if replica in self._watched:
            self._note(replica)
        self._ended.pop(replica, None)

    def _note(self, replica: str) -> None:
        self._ended[replica] = self._clock()
        descriptor = self._watched.pop(replica)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
