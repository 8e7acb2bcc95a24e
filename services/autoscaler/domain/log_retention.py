"""Choose the logs of ended replicas to keep: the newest, up to a size. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

# One Deployment that fails again and again must not push out the logs of all others.
SHARE = 0.25
MOST_EACH = 100


class LogLimits(NamedTuple):
    """``keep_s``: how long after its last line a log is kept. ``total_bytes``: of all of them."""

    keep_s: float = 7 * 86_400.0
    total_bytes: int = 1024 * 2**20


class EndedReplicaLog(NamedTuple):
    """The log of an ended replica, its rotated parts included. ``written_at`` in seconds since the epoch."""

    name: str
    deployment: str
    size: int
    written_at: float


def overdue(logs: Iterable[EndedReplicaLog], now: float, limits: LogLimits) -> list[str]:
    """Return the names of the logs to delete: the too old, then the oldest of those above the sizes."""
    kept, deleted = 0, []
    of, count = defaultdict[str, int](int), defaultdict[str, int](int)
    for log in sorted(logs, key=lambda each: each.written_at, reverse=True):
        fits = (
            now - log.written_at <= limits.keep_s
            and kept + log.size <= limits.total_bytes
            and of[log.deployment] + log.size <= limits.total_bytes * SHARE
            and count[log.deployment] < MOST_EACH
        )
        if fits:
            kept += log.size
            of[log.deployment] += log.size
            count[log.deployment] += 1
        else:
            deleted.append(log.name)
    return deleted
