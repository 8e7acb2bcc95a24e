"""The leader lock: an flock on ``<state>/run/autoscaler.lock``.

The kernel releases it when the process ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from pathlib import Path

POLL_S = 0.5


class LeaderLock:
    """The lock that makes one autoscaler the leader."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Return whether this process leads."""
        return self._descriptor is not None

    def try_take(self) -> bool:
        """Take the lock if it is free, and return whether this process has it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor
        return True

    async def take(self) -> None:
        """Wait until this process has the lock."""
        while not self.try_take():
            await asyncio.sleep(POLL_S)

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def holder(self) -> str:
        """Return the leader's pid from the lock file; empty if the file cannot be read."""
        try:
            return self._path.read_text().strip()
        except OSError:
            return ""
