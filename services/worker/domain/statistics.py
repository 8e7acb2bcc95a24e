"""Counts of a worker's requests, and mean durations and sizes of its recent calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from services.worker.domain.call_duration import Mean
from services.worker.domain.time_ledger import TimeLedger
from tidegate.kernel.protocol.statistics import (
    BATCH,
    CACHE,
    COMPUTE,
    EXECUTIONS,
    INFERENCES,
    count_name,
    time_name,
)


class RequestCounts:
    """Counts of requests since :meth:`take` was last called. If requests share a call, each is counted."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._returned: Counter[str] = Counter()

    def add_success(self, requests: int, rows: int, waited_s: float, call_s: float) -> None:
        """Add a call of ``call_s`` seconds. ``rows`` and ``waited_s`` are sums over all its requests."""
        counts = self._counts
        counts["success.count"] += requests
        counts["success.ns"] += int((waited_s + call_s * requests) * 1e9)
        counts["queue.count"] += requests
        counts["queue.ns"] += int(waited_s * 1e9)
        counts["compute_infer.ns"] += int(call_s * requests * 1e9)
        counts[INFERENCES] += rows

    def add_failure(self, requests: int, spent_s: float) -> None:
        """Add ``requests`` failed requests. Each of them failed after ``spent_s`` seconds."""
        self._counts["fail.count"] += requests
        self._counts["fail.ns"] += int(spent_s * requests * 1e9)

    def take(self, triton: Mapping[str, int]) -> dict[str, int]:
        """Return all counts and reset them.

        ``triton``: Triton's counts for the same period, with the duration of each part of a call.
        """
        counts, self._counts = self._counts, Counter()
        requests = counts["success.count"]
        for part in COMPUTE:
            counts[count_name(part)] = requests
        if calls := triton.get("success.count", 0):
            del counts["compute_infer.ns"]
            for part in ("queue", *COMPUTE):
                counts[time_name(part)] += triton.get(time_name(part), 0) * requests // calls
        counts[EXECUTIONS] = triton.get(EXECUTIONS, 0)
        counts.update({name: count for name, count in triton.items() if name.startswith((BATCH, *CACHE))})
        counts.update(self._returned)
        self._returned = Counter()
        return {name: count for name, count in counts.items() if count}

    def put_back(self, counts: Mapping[str, int]) -> None:
        """Add counts that were taken but could not be stored. The next :meth:`take` returns them."""
        self._returned.update(counts)


class WorkStats:
    """Totals of a worker since its start, and mean durations and sizes of its recent calls.

    ``busy_s`` is in seconds, ``call_ms`` in milliseconds. ``time`` divides the replica's whole time into
    parts such as calls, idle time and start-up.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.busy_s = 0.0
        self.call_ms = Mean()
        self.batch = Mean()
        self.rows = Mean()
        self.open_calls = Mean()
        self.counts = RequestCounts()
        self.time = TimeLedger()


def since(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Return by how much each count grew between two readings.

    If a count became smaller, it was reset to 0 in between. Then its present value is returned.
    """
    return {
        name: count - before[name] if count >= before.get(name, count + 1) else count
        for name, count in now.items()
    }
