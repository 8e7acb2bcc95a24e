"""Remember since when each container drains, in one file each, so that it survives a restart."""

from __future__ import annotations

import contextlib
from pathlib import Path


class DrainMarks:
    """The drain times in ``folder``. The first time of a replica is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, replica: str, at: float) -> None:
        """Remember that ``replica`` drains since ``at`` (seconds since the epoch)."""
        if self.since(replica) is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{replica}.new"
        temporary.write_text(f"{at:.3f}")
        temporary.replace(self._folder / replica)

    def since(self, replica: str) -> float | None:
        """Return since when a replica drains (seconds since the epoch); None if it does not."""
        try:
            return float((self._folder / replica).read_text())
        except (OSError, ValueError):
            return None

    def drop(self, replica: str) -> None:
        """Remove the time of a replica."""
        with contextlib.suppress(OSError):
            (self._folder / replica).unlink(missing_ok=True)
