"""The logs of workers.

Logs of ended workers are deleted if they are too old, or if all logs together exceed limits of size and
number. Old logs are deleted first.
"""

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
    """The files ``worker-<replica>.log`` in ``folder``; some are links to logs of warm pool workers."""

    def __init__(
        self, folder: Path, limits: LogLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._limits = limits or LogLimits()
        self._clock = clock

    def path(self, replica: str) -> Path:
        """Return the path of a replica's log."""
        return self._folder / f"{_WORKER}{replica}.log"

    def keep(self, replica: str, output: str) -> None:
        """Write a replica's output to its log. An error, for example a full disk, is only logged."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.path(replica).write_text(output)
            self.prune()
        except OSError as error:
            log.warning(
                "a worker's output was not written", extra={"replica": replica, "problem": str(error)}
            )

    def prune(self, lives: Callable[[str], bool] = lambda _: False) -> None:
        """Delete logs of ended replicas that are too old, or that exceed the limits of size and number.

        Old logs are deleted first. ``lives`` returns True for a replica that has not ended.

        A live replica from a warm pool has a log with two names: the file of the pool's worker, and a link to
        this file with the replica's name. Both are kept until the replica ends.
        """
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
    """Return the size of a log and the time of its last change.

    Links are not followed, because the target may be missing.
    """
    size, written_at = 0, 0.0
    for path in parts:
        with contextlib.suppress(OSError):
            found = path.lstat()
            size, written_at = size + found.st_size, max(written_at, found.st_mtime)
    return EndedReplicaLog(replica, deployment_of(replica), size, written_at)
