"""Judge a canary by reported outcomes: count the bad outcomes of the canary and of the baseline. Pure.

An outcome is bad if it is worse than a limit. The limit is a quartile of the baseline's first ``FREEZE_AT``
outcomes, so about a quarter of them are worse. If outcomes have only a few values, such as 0 and 1, often
none is worse than the limit. Then an outcome that equals the limit also counts as bad. Otherwise there would
be no bad outcomes to compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.router.domain.evidence import Tick
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.models import Rollout

FREEZE_AT = 100
# Outcomes that equal the limit also count as bad if both are true: less than this share of the baseline's
# first outcomes is worse than the limit, and at least one first outcome is better than the limit.
FEWEST_BAD = 0.05


@dataclass(slots=True)
class Limit:
    """The limit that separates bad outcomes from the others.

    ``sign``: 1 if higher outcomes are better, otherwise -1. ``value``: the limit multiplied by ``sign``.
    ``inclusive``: True if an outcome that equals the limit is bad.
    """

    sign: int
    value: float
    inclusive: bool

    def is_bad(self, outcome: float) -> bool:
        """Return True if an outcome is bad."""
        signed = self.sign * outcome
        return signed < self.value or (self.inclusive and signed == self.value)


@dataclass(slots=True)
class Outcomes:
    """The outcomes of the canary or of the baseline: their number, their sum, and how many were bad."""

    count: int = 0
    total: float = 0.0
    bad: int = 0

    @property
    def mean(self) -> float:
        """Return the mean outcome; 0 without outcomes."""
        return self.total / max(1, self.count)


@dataclass(slots=True)
class QualityWatch:
    """The outcomes of one rollout since its start at ``since`` (ms since the epoch).

    ``position``: the position in the feedback stream up to which records were read. ``first``: the baseline's
    first outcomes, from which the limit is computed. ``waiting``: four counts for the next tick: the canary's
    new outcomes, the canary's bad ones, the baseline's new outcomes, the baseline's bad ones.
    """

    position: str = ""
    since: int = 0
    first: list[float] = field(default_factory=list)
    limit: Limit | None = None
    canary: Outcomes = field(default_factory=Outcomes)
    base: Outcomes = field(default_factory=Outcomes)
    waiting: tuple[int, int, int, int] = (0, 0, 0, 0)

    def take(self, endpoint: str, rollout: Rollout, records: Iterable[FeedbackRecord]) -> Tick | None:
        """Count new feedback. Return a tick if both canary and baseline have new outcomes, otherwise None.

        A record counts only if both are true: its request was answered after the rollout's start, and weights
        or a sticky key chose the Deployment. If a rule or the request itself chose the Deployment, canary and
        baseline get different kinds of requests. Then their outcomes cannot be compared.
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
        """Return a text with the number of missing baseline outcomes; empty if there are enough."""
        if self.limit is not None:
            return ""
        return f"quality: feedback on {FREEZE_AT - len(self.first)} more answers of the baseline is needed"


def limit_of(values: list[float], sign: int) -> Limit:
    """Return the limit beyond which an outcome is bad.

    ``values``: the baseline's first outcomes. ``sign``: see :class:`Limit`.
    """
    signed = sorted(sign * value for value in values)
    quartile = signed[len(signed) // 4]
    worse = sum(value < quartile for value in signed)
    better = signed[-1] > quartile  # if none is better, an inclusive limit would make all outcomes bad
    return Limit(sign, quartile, better and worse < FEWEST_BAD * len(signed))
