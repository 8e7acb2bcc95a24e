"""The output of workers after their end, for people who look for a reason: the newest few."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from tidegate import telemetry

log = telemetry.logger(__name__)

KEPT_LOGS = 40


class KeptLogs:
    """``worker-<replica>.log`` in ``folder``; it may be a link to one that began under another name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, replica: str) -> Path:
        """Where the output of a replica is."""
        return self._folder / f"worker-{replica}.log"

    def keep(self, replica: str, output: str) -> None:
        """Write it down; a disk that is full is no reason to keep a dead worker."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.path(replica).write_text(output)
            self.prune()
        except OSError as error:
            log.warning("a worker's output was not kept", extra={"replica": replica, "problem": str(error)})

    def prune(self, lives: Callable[[str], bool] = lambda _: False) -> None:
        """Delete the oldest ones, but for those of replicas that live, under either name."""
        found = [*self._folder.glob("worker-*.log")]
        living = {path.resolve() for path in found if lives(path.stem[7:])}
        dead = [path for path in found if path.resolve() not in living]
        for path in sorted(dead, key=_written_at)[:-KEPT_LOGS]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _written_at(path: Path) -> float:
    """Of a link its own time: what it leads to may be gone, or not there yet."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
