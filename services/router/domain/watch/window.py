"""The traffic and the replicas of one endpoint between two moments. Windows can be added up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import orjson

from tidegate.kernel.protocol.latency_buckets import COUNT, FIRST_S, RATIO, upper_s
from tidegate.kernel.protocol.traffic import LEDGER, ROWS
from tidegate.kernel.protocol.traffic_histograms import dense, no_times, sparse

# The middle of each bucket in seconds.
_MIDDLES = FIRST_S * RATIO ** (np.arange(COUNT) + 0.5)


@dataclass(slots=True)
class ReplicaWork:
    """The work of one replica in a window.

    ``busy_s``: seconds in which the replica ran calls. ``call_ms``: a sum to which each request adds the
    duration of its call. ``batch``: a sum to which each request adds the number of requests in its call.
    ``stuck_s``: seconds in which the replica had requests and finished none.
    """

    requests: int = 0
    busy_s: float = 0.0
    call_ms: float = 0.0
    batch: float = 0.0
    stuck_s: float = 0.0

    def add(self, other: ReplicaWork) -> None:
        """Add the work of another period."""
        self.requests += other.requests
        self.busy_s += other.busy_s
        self.call_ms += other.call_ms
        self.batch += other.batch
        self.stuck_s += other.stuck_s

    @property
    def mean_call_ms(self) -> float | None:
        """Return the mean duration of a call in ms, weighted by requests; None without requests."""
        return self.call_ms / self.requests if self.requests else None

    @property
    def mean_batch(self) -> float | None:
        """Return the mean number of requests in a call, weighted by requests; None without requests."""
        return self.batch / self.requests if self.requests else None


@dataclass(slots=True)
class Window:
    """The traffic and the replicas of one endpoint from ``start`` to ``end`` (seconds since the epoch).

    - ``times``: histograms (``ROWS`` x buckets) of the times of answered requests
    - ``outcomes``, ``answered_by``: the number of requests by outcome, and of answers by Deployment
    - ``failed``: the number of requests that failed because of the service
    - ``slow``: the number of answers slower than the endpoint's objective
    - ``callers``: the number of distinct callers since the day began
    - ``replica_s``: the running times of all replicas, added up
    - ``used_s``: ``replica_s`` multiplied by the replicas' utilization
    - ``cold_s``: seconds with waiting requests but no ready replica
    - ``queue``: the highest number of waiting requests
    - ``queue_age_s``: the highest age of a waiting request
    - ``restarts``: the number of replicas and models that ended unexpectedly
    - ``dead``: the number of dead letters
    """

    start: float
    end: float
    times: np.ndarray = field(default_factory=no_times)
    outcomes: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    slow: int = 0
    answered_by: dict[str, int] = field(default_factory=dict)
    callers: int = 0
    replica_s: float = 0.0
    used_s: float = 0.0
    cold_s: float = 0.0
    queue: int = 0
    queue_age_s: float = 0.0
    restarts: int = 0
    dead: int = 0
    replicas: dict[str, ReplicaWork] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Return the length in seconds."""
        return max(0.0, self.end - self.start)

    @property
    def answered(self) -> int:
        """Return the number of answered requests."""
        return self.outcomes.get("ok", 0)

    @property
    def requests(self) -> int:
        """Return the number of requests that were answered, or that failed because of the service."""
        return self.answered + self.failed

    @property
    def error_rate(self) -> float:
        """Return the share of ``requests`` that failed because of the service (0 to 1)."""
        return self.failed / self.requests if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Return the number of requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def utilization(self) -> float | None:
        """Return the share of the replicas' time that was used; None without replicas."""
        return min(1.0, self.used_s / self.replica_s) if self.replica_s else None

    def timed(self, row: str = ROWS[0]) -> int:
        """Return the number of requests with a measured time in this row of ``times``."""
        return int(self.times[ROWS.index(row)].sum())

    def quantile_s(self, part: float, row: str = ROWS[0]) -> float | None:
        """Return the quantile ``part`` (0 to 1) of the times in seconds; None without times.

        The result is the upper bound of the bucket that contains the quantile.
        """
        return quantile_s(self.times[ROWS.index(row)], part)

    def mean_s(self, row: str = ROWS[0]) -> float:
        """Return the mean time in seconds, computed from the middles of the buckets; 0 without times."""
        counts = self.times[ROWS.index(row)]
        total = counts.sum()
        return float(counts @ _MIDDLES / total) if total else 0.0

    def ledger_ms(self) -> dict[str, float]:
        """Return the mean time of each step of a request in ms, by the step's name."""
        return {row: self.mean_s(row) * 1e3 for row in LEDGER}

    def slower_than(self, seconds: float) -> int:
        """Return the number of answers that took more than ``seconds``, with the precision of the buckets."""
        above = np.searchsorted(_MIDDLES, seconds)
        return int(self.times[0, above:].sum())

    def add(self, other: Window) -> None:
        """Add another window to this one. This window then covers the time of both."""
        self.start, self.end = min(self.start, other.start), max(self.end, other.end)
        self.times = self.times + other.times
        for mine, more in ((self.outcomes, other.outcomes), (self.answered_by, other.answered_by)):
            for name, count in more.items():
                mine[name] = mine.get(name, 0) + count
        self.failed += other.failed
        self.slow += other.slow
        self.replica_s += other.replica_s
        self.used_s += other.used_s
        self.cold_s += other.cold_s
        self.restarts += other.restarts
        self.dead += other.dead
        self.callers = max(self.callers, other.callers)
        self.queue = max(self.queue, other.queue)
        self.queue_age_s = max(self.queue_age_s, other.queue_age_s)
        for name, work in other.replicas.items():
            self.replicas.setdefault(name, ReplicaWork()).add(work)

    def to_json(self) -> bytes:
        """Return the window as JSON, without zero and empty fields."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["times"] = sparse(self.times)
        fields["replicas"] = {name: asdict(work) for name, work in self.replicas.items()}
        return orjson.dumps(
            {name: value for name, value in fields.items() if value or name in ("start", "end")}
        )

    @classmethod
    def from_json(cls, raw: bytes) -> Window:
        """Return the window from JSON. Unknown fields of a newer release are ignored."""
        fields: dict[str, Any] = {k: v for k, v in orjson.loads(raw).items() if k in cls.__dataclass_fields__}
        fields["times"] = dense(fields.get("times", []))
        fields["replicas"] = {name: ReplicaWork(**each) for name, each in fields.get("replicas", {}).items()}
        return cls(**fields)


def merged(windows: Iterable[Window], start: float, end: float) -> Window:
    """Return the sum of windows. Without windows, return an empty one from ``start`` to ``end``."""
    found: Window | None = None
    for each in windows:
        if found is None:
            found = Window(each.start, each.end)
        found.add(each)
    return found or Window(start, end)


def quantile_s(counts: np.ndarray, part: float) -> float | None:
    """Return the upper bound in seconds of the bucket that contains a quantile; None without counts.

    ``part``: the quantile, from 0 to 1.
    """
    total = counts.sum()
    if not total:
        return None
    return upper_s(int(np.searchsorted(np.cumsum(counts), part * total)))
