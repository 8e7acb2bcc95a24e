"""The output of workers after their end, for people who look for a reason: the newest few."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tidegate import telemetry

log = telemetry.logger(__name__)

KEPT_LOGS = 40


class KeptLogs:
    """``worker-<replica>.log`` in ``folder``."""

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
        """Delete the oldest ones, but for those of replicas that live."""
        dead = [path for path in self._folder.glob("worker-*.log") if not lives(path.stem[7:])]
        for path in sorted(dead, key=lambda p: p.stat().st_mtime)[:-KEPT_LOGS]:
            path.unlink(missing_ok=True)
