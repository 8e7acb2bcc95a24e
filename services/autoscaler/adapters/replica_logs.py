"""The output of workers after their end, for people who look for a reason: by age and size."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from services.autoscaler.domain.log_retention import EndedReplicaLog, LogLimits, overdue
from tidegate.kernel import telemetry
from tidegate.kernel.protocol.log_lines import deployment_of, log_of

log = telemetry.logger(__name__)

_WORKER = "worker-"


class ReplicaLogs:
    """``worker-<replica>.log`` in ``folder``; it may be a link to one that began under another name."""

    def __init__(
        self, folder: Path, limits: LogLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._limits = limits or LogLimits()
        self._clock = clock

    def path(self, replica: str) -> Path:
        """Where the output of a replica is."""
        return self._folder / f"{_WORKER}{replica}.log"

    def keep(self, replica: str, output: str) -> None:
        """Write it down; a disk that is full is no reason to keep a dead worker."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.path(replica).write_text(output)
            self.prune()
        except OSError as error:
            log.warning("a worker's output was not kept", extra={"replica": replica, "problem": str(error)})

    def prune(self, lives: Callable[[str], bool] = lambda _: False) -> None:
        """Delete what is too old or too much, but nothing of replicas that live, under either name."""
        found = defaultdict[str, list[Path]](list)
        for path in self._folder.glob(f"{_WORKER}*.log*"):
            found[log_of(path.name)].append(path)
        living = {path.resolve() for replica, parts in found.items() if lives(replica) for path in parts}
        dead = {
            replica: parts for replica, parts in found.items() if not living & {p.resolve() for p in parts}
        }
        kept = [_kept(replica, parts) for replica, parts in dead.items()]
        for replica in overdue(kept, self._clock(), self._limits):
            for path in dead[replica]:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def _kept(replica: str, parts: list[Path]) -> EndedReplicaLog:
    """Of a link its own time and size: what it leads to may be gone, or not there yet."""
    size, written_at = 0, 0.0
    for path in parts:
        with contextlib.suppress(OSError):
            found = path.lstat()
            size, written_at = size + found.st_size, max(written_at, found.st_mtime)
    return EndedReplicaLog(replica, deployment_of(replica), size, written_at)
