"""Choose the logs of ended replicas to delete: logs that are too old, and logs beyond the limits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

# Limits for one Deployment: a share of ``LogLimits.total_bytes``, and a number of logs. So the logs of a
# Deployment that fails repeatedly do not displace the logs of other Deployments.
SHARE = 0.25
MOST_EACH = 100


class LogLimits(NamedTuple):
    """The limits for logs of ended replicas.

    A log is kept for at most ``keep_s`` seconds after its last line. All logs together have at most
    ``total_bytes``.
    """

    keep_s: float = 7 * 86_400.0
    total_bytes: int = 1024 * 2**20


class EndedReplicaLog(NamedTuple):
    """The log of an ended replica, with its rotated parts. ``written_at`` is in seconds since the epoch."""

    name: str
    deployment: str
    size: int
    written_at: float


def overdue(logs: Iterable[EndedReplicaLog], now: float, limits: LogLimits) -> list[str]:
    """Return the names of the logs to delete.

    These are the logs that are too old, and the logs that exceed a limit. The logs are counted from the
    newest to the oldest, so a limit affects old logs first.
    """
    kept, deleted = 0, []
    sizes, count = defaultdict[str, int](int), defaultdict[str, int](int)
    for log in sorted(logs, key=lambda each: each.written_at, reverse=True):
        fits = (
            now - log.written_at <= limits.keep_s
            and kept + log.size <= limits.total_bytes
            and sizes[log.deployment] + log.size <= limits.total_bytes * SHARE
            and count[log.deployment] < MOST_EACH
        )
        if fits:
            kept += log.size
            sizes[log.deployment] += log.size
            count[log.deployment] += 1
        else:
            deleted.append(log.name)
    return deleted
