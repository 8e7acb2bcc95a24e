"""Since when a replica is asked to finish: one small file for each, kept over a restart."""

from __future__ import annotations

import contextlib
from pathlib import Path


class DrainMarks:
    """Marks in ``folder``. The first mark of a replica counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, replica: str, at: float) -> None:
        """Note that ``replica`` is asked to finish, at seconds since the epoch."""
        if self.since(replica) is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{replica}.new"
        temporary.write_text(f"{at:.3f}")
        temporary.replace(self._folder / replica)

    def since(self, replica: str) -> float | None:
        """Since when (seconds since the epoch); None: it is not asked to."""
        try:
            return float((self._folder / replica).read_text())
        except (OSError, ValueError):
            return None

    def drop(self, replica: str) -> None:
        """Forget the mark."""
        with contextlib.suppress(OSError):
            (self._folder / replica).unlink(missing_ok=True)
