"""Judge a canary by reported outcomes: count those that are worse than most of the baseline's. Pure.

An outcome is bad if it is worse than the baseline's quartile on the bad side. The quartile is frozen after
the baseline's first ``FREEZE_AT`` outcomes. If the outcomes have few values, such as 0 and 1, the quartile
itself may count as bad, so that the baseline has bad outcomes at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.router.domain.evidence import Tick
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.models import Rollout

FREEZE_AT = 100
# If fewer of the baseline's outcomes than this part are worse than the quartile, the quartile is bad, too.
FEWEST_BAD = 0.05


@dataclass(slots=True)
class Limit:
    """The limit of a bad outcome. ``sign``: 1 if higher is better, else -1. ``value``: with that sign."""

    sign: int
    value: float
    inclusive: bool

    def is_bad(self, outcome: float) -> bool:
        """Return True if an outcome is bad."""
        signed = self.sign * outcome
        return signed < self.value or (self.inclusive and signed == self.value)


@dataclass(slots=True)
class Outcomes:
    """The number of outcomes of one side, their sum, and how many were bad."""

    count: int = 0
    total: float = 0.0
    bad: int = 0

    @property
    def mean(self) -> float:
        """Return the mean outcome; 0 without any."""
        return self.total / max(1, self.count)


@dataclass(slots=True)
class QualityWatch:
    """The outcomes of one rollout. ``position``: where to read on. ``since``: the rollout's start in ms.

    ``first``: the baseline's first outcomes. ``waiting``: the outcomes of both sides that no tick has yet.
    """

    position: str = ""
    since: int = 0
    first: list[float] = field(default_factory=list)
    limit: Limit | None = None
    canary: Outcomes = field(default_factory=Outcomes)
    base: Outcomes = field(default_factory=Outcomes)
    waiting: tuple[int, int, int, int] = (0, 0, 0, 0)

    def take(self, endpoint: str, rollout: Rollout, records: Iterable[FeedbackRecord]) -> Tick | None:
        """Count new records. Return a tick if both sides have new outcomes, else None: they wait for it.

        Only answers count whose Deployment weights or a sticky key chose, after the rollout began.
        """
        for record in records:
            if record.endpoint != endpoint or record.metric != rollout.options.metric:
                continue
            if record.value is not None and record.assigned and record.answered_at >= self.since:
                self._count(rollout, record.deployment, record.value)
        canary, canary_bad, base, base_bad = self.waiting
        if not canary or not base:
            return None
        self.waiting = (0, 0, 0, 0)
        return Tick(canary, canary_bad, base, base_bad)

    def _count(self, rollout: Rollout, deployment: str, value: float) -> None:
        ours = deployment == rollout.deployment
        side = self.canary if ours else self.base
        side.count, side.total = side.count + 1, side.total + value
        if self.limit is None:
            if not ours:
                self._learn(rollout, value)
            return
        bad = self.limit.is_bad(value)
        side.bad += bad
        canary, canary_bad, base, base_bad = self.waiting
        if ours:
            self.waiting = (canary + 1, canary_bad + bad, base, base_bad)
        else:
            self.waiting = (canary, canary_bad, base + 1, base_bad + bad)

    def _learn(self, rollout: Rollout, value: float) -> None:
        self.first.append(value)
        if len(self.first) >= FREEZE_AT:
            self.limit = limit_of(self.first, 1 if rollout.options.direction == "up" else -1)

    def missing(self) -> str:
        """Return what is missing before outcomes can be judged; empty if nothing."""
        if self.limit is not None:
            return ""
        return f"quality: feedback on {FREEZE_AT - len(self.first)} more answers of the baseline is needed"


def limit_of(values: list[float], sign: int) -> Limit:
    """Return the limit of a bad outcome, from outcomes of the baseline."""
    signed = sorted(sign * value for value in values)
    quartile = signed[len(signed) // 4]
    worse = sum(value < quartile for value in signed)
    better = signed[-1] > quartile  # else all outcomes of the baseline would be bad
    return Limit(sign, quartile, better and worse < FEWEST_BAD * len(signed))
