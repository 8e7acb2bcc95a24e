"""Check that no job is lost, by comparing three independent counts of jobs. Pure.

The three sources are the jobs that gateways have acknowledged with a 202, the job records, and the messages.
A message is either ready in a queue (``ready``) or received by a worker (``held``). A job needs no message
while a lease or the sweeper watches it (``watched``). If nothing is lost,

    acknowledged                <= accepted
    accepted                     = succeeded + failed + cancelled + expired + unfinished
    unfinished, per Deployment  <= ready + held + watched

The sources cannot be read at the same instant, so the job records are read before and after the messages.
Jobs that arrived between these two reads are not counted as missing. During failures, a job can seem to be
missing in a single reading although it is not lost. Therefore only jobs that are missing in several readings
in a row are reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidegate.kernel.protocol.jobs import TERMINAL, Counts

# Jobs are reported as lost if they are missing in this many readings in a row.
CONFIRMATIONS = 3
OVER = ("succeeded", "failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True)
class LedgerReading:
    """One reading of all sources.

    ``accepted_before``: the number of accepted jobs, read before the messages. ``counts``: the job records,
    read after the messages. ``ready``, ``held``: the number of messages in queues and at workers, by
    Deployment.
    """

    accepted_before: int
    counts: Counts
    ready: Mapping[str, int]
    held: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """The number of jobs that are missing in one reading of the ledger, by kind of loss.

    ``where``: each Deployment with too few messages. The value is True if it still has some messages, and
    False if it has none.
    """

    records: int  # jobs with a 202, but without a job record
    endings: int  # accepted jobs that are in no state (negative: jobs that are counted in two states)
    messages: int  # unfinished jobs that have no message and that neither a lease nor the sweeper watches
    where: Mapping[str, bool] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return the number of all missing jobs."""
        return self.records + abs(self.endings) + self.messages


def discrepancy(reading: LedgerReading) -> Discrepancy:
    """Return the number of jobs that are missing in one reading of the ledger."""
    counts = reading.counts
    accepted = counts.ledger.get("accepted", 0)
    over = sum(counts.ledger.get(state, 0) for state in OVER)
    lost, where = 0, {}
    for name, load in counts.deployments.items():
        messages = reading.ready.get(name, 0) + reading.held.get(name, 0)
        if load.waiting + load.running > messages:
            lost += load.waiting + load.running - messages
            where[name] = messages > 0
    arrived = max(0, accepted - reading.accepted_before)
    return Discrepancy(
        records=max(0, sum(counts.acknowledged.values()) - accepted),
        endings=accepted - over - counts.unfinished,
        messages=max(0, lost - arrived - counts.watched),
        where=where,
    )


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """The result of the last check of the ledger. ``at``: seconds since the epoch.

    ``unaccounted``: the number of lost jobs; None if a source did not answer. ``away``: the sources that did
    not answer, each with the problem.
    """

    at: float
    unaccounted: int | None
    away: Mapping[str, str] = field(default_factory=dict)
    reading: LedgerReading | None = None
    missing: Discrepancy | None = None

    @property
    def gauge(self) -> float:
        """Return ``unaccounted`` for the metric; NaN if it is unknown."""
        return math.nan if self.unaccounted is None else float(self.unaccounted)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        summary: dict[str, Any] = {"at": self.at, "unaccounted": self.unaccounted, "away": dict(self.away)}
        if self.reading is None or self.missing is None:
            return summary
        reading, counts = self.reading, self.reading.counts
        return summary | {
            "acknowledged": sum(counts.acknowledged.values()),
            "accepted": counts.ledger.get("accepted", 0),
            "over": {state: counts.ledger.get(state, 0) for state in OVER},
            "unfinished": {s: n for s, n in counts.states.items() if s not in TERMINAL},
            "messages": {
                "ready": sum(reading.ready.values()),
                "held": sum(reading.held.values()),
                "watched": counts.watched,
            },
            "kept": sum(n for state, n in counts.states.items() if state in TERMINAL),
            "removed": counts.ledger.get("removed", 0),
            "missing": {
                "records": self.missing.records,
                "endings": self.missing.endings,
                "messages": self.missing.messages,
            },
        }


def confirmed(missing: Sequence[Discrepancy]) -> int:
    """Return the number of jobs that were missing in each of the last ``CONFIRMATIONS`` readings."""
    last = missing[-CONFIRMATIONS:]
    return min(each.total for each in last) if len(last) >= CONFIRMATIONS else 0


def lost_messages(missing: Sequence[Discrepancy]) -> dict[str, bool]:
    """Return the Deployments with too few messages in each of the last ``CONFIRMATIONS`` readings.

    The value is True if the Deployment still has some messages, and False if it has none.
    """
    last = missing[-CONFIRMATIONS:]
    if len(last) < CONFIRMATIONS or not all(each.messages for each in last):
        return {}
    return {name: left for name, left in last[-1].where.items() if all(name in each.where for each in last)}
