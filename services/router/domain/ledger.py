"""The conservation ledger of jobs: is any job lost? Pure.

Three sources that do not know of each other: what the gateways say they have acknowledged with a 202, what
the records say, and where the messages are (ready in the broker, held by workers, or in no queue because a
lease or the sweeper keeps the job). With nothing lost

    acknowledged                <= accepted
    accepted                     = succeeded + failed + cancelled + expired + unfinished
    unfinished, per Deployment  <= ready + held + watched

They cannot be read in one instant. So the records are read before and after the rest: a job that was there
before and is not over after was somewhere in between. What arrived meanwhile is left out of the count, so
that a look never sees a loss in jobs that only moved; while things fail and come back one look may, and only
what several looks in a row miss is reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidegate.kernel.protocol.jobs import TERMINAL, Counts

LOOKS = 3
OVER = ("succeeded", "failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True)
class LedgerReading:
    """One look at all sources. ``accepted_before``: the count of the records read first; ``counts`` is read
    last. ``ready`` and ``held``: messages by Deployment.
    """

    accepted_before: int
    counts: Counts
    ready: Mapping[str, int]
    held: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """What one look does not find."""

    records: int  # acknowledged, and never recorded
    endings: int  # recorded, and neither over nor unfinished (below 0: counted twice)
    messages: int  # unfinished, and in no queue, at no worker, under no watch
    # Of the messages, where: Deployments, and whether they have any message left.
    where: Mapping[str, bool] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All that is not accounted for."""
        return self.records + abs(self.endings) + self.messages


def missing(look: LedgerReading) -> Discrepancy:
    """What is not accounted for in one look."""
    counts = look.counts
    accepted = counts.ledger.get("accepted", 0)
    over = sum(counts.ledger.get(state, 0) for state in OVER)
    lost, where = 0, {}
    for name, load in counts.deployments.items():
        found = look.ready.get(name, 0) + look.held.get(name, 0)
        if load.waiting + load.running > found:
            lost += load.waiting + load.running - found
            where[name] = found > 0
    fresh = max(0, accepted - look.accepted_before)
    return Discrepancy(
        records=max(0, sum(counts.acknowledged.values()) - accepted),
        endings=accepted - over - counts.unfinished,
        messages=max(0, lost - fresh - counts.watched),
        where=where,
    )


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """What the ledger says now. ``unaccounted`` None: not known, since the sources in ``away`` do not answer
    (why, by name). ``at`` is seconds since the epoch.
    """

    at: float
    unaccounted: int | None
    away: Mapping[str, str] = field(default_factory=dict)
    look: LedgerReading | None = None
    missing: Discrepancy | None = None

    @property
    def gauge(self) -> float:
        """``unaccounted`` as a metric: NaN when it is not known."""
        return math.nan if self.unaccounted is None else float(self.unaccounted)

    def shown(self) -> dict[str, Any]:
        """As JSON values."""
        told: dict[str, Any] = {"at": self.at, "unaccounted": self.unaccounted, "away": dict(self.away)}
        if self.look is None or self.missing is None:
            return told
        look, counts = self.look, self.look.counts
        return told | {
            "acknowledged": sum(counts.acknowledged.values()),
            "accepted": counts.ledger.get("accepted", 0),
            "over": {state: counts.ledger.get(state, 0) for state in OVER},
            "unfinished": {s: n for s, n in counts.states.items() if s not in TERMINAL},
            "messages": {
                "ready": sum(look.ready.values()),
                "held": sum(look.held.values()),
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


def confirmed(looks: Sequence[Discrepancy]) -> int:
    """What is reported after these looks: only what the last few in a row have missed."""
    return min(look.total for look in looks[-LOOKS:]) if len(looks) >= LOOKS else 0


def lost_messages(looks: Sequence[Discrepancy]) -> dict[str, bool]:
    """Deployments whose jobs have lost messages, by the last few looks in a row, and whether they have any
    message left."""
    last = looks[-LOOKS:]
    if len(last) < LOOKS or not all(look.messages for look in last):
        return {}
    return {name: left for name, left in last[-1].where.items() if all(name in look.where for look in last)}
