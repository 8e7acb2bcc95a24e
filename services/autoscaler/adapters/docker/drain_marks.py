"""Files with the time at which each container began to drain. They survive a restart of the autoscaler."""

from __future__ import annotations

import contextlib
from pathlib import Path


class DrainMarks:
    """The files in ``folder``: one for each draining replica, with the time when its drain began."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, replica: str, at: float) -> None:
        """Store the time at which a replica's drain began (``at``, in seconds since the epoch).

        If a time is already stored, it does not change.
        """
        if self.since(replica) is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{replica}.new"
        temporary.write_text(f"{at:.3f}")
        temporary.replace(self._folder / replica)

    def since(self, replica: str) -> float | None:
        """Return when a replica's drain began (seconds since the epoch); None if it is not draining."""
        try:
            return float((self._folder / replica).read_text())
        except (OSError, ValueError):
            return None

    def drop(self, replica: str) -> None:
        """Delete the stored time of a replica."""
        with contextlib.suppress(OSError):
            (self._folder / replica).unlink(missing_ok=True)
