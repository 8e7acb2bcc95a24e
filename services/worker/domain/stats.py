"""What the heartbeat tells of the work."""

from __future__ import annotations

from services.worker.domain.pace import Mean
from services.worker.domain.statistics import Tally


class Stats:
    """Totals since the start, and recent means. Times in seconds, ``call_ms`` in milliseconds."""

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.busy_s = 0.0
        self.call_ms = Mean()
        self.batch = Mean()
        self.rows = Mean()
        self.open_calls = Mean()
        self.tally = Tally()
