"""The facts about one endpoint that the alert rules read. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from typing import Literal, NamedTuple

from services.router.domain.watch.history import Brief, EndpointHistory
from services.router.domain.watch.window import Window
from tidegate.kernel.protocol.service_level import AlertLimits, ServiceLevel

FIVE_MINUTES = 300.0
QUARTER = 900.0
HOUR = 3600.0
DAY = 86_400.0
# The windows of burn rates in seconds, as in chapter 5 of Google's SRE workbook.
BURN_WINDOWS = (FIVE_MINUTES, 1800.0, HOUR, 6 * HOUR, 3 * DAY)
# A minute with fewer than LEAST_ANSWERS answers has no useful 99th percentile. A baseline needs LEAST_MINUTES
# useful minutes.
LEAST_ANSWERS = 50
LEAST_MINUTES = 30

FindingRule = Literal["Drift", "QualityDrop", "CostCap"]


class Counts(NamedTuple):
    """Numbers of requests in a period: all, failed, and answered too slowly."""

    requests: int = 0
    failed: int = 0
    slow: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding of another part of the router, such as drift. ``subject``: a version or a Deployment."""

    rule: FindingRule
    endpoint: str
    subject: str
    value: float
    limit: float
    summary: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """The usual latency of an endpoint: a summary of the p99 of each past minute, in seconds.

    ``p99_s``: the median of these values. About 5 % of the minutes have a p99 above ``high_s``.
    """

    p99_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about one endpoint. ``recent``: its last 5 minutes. ``quarter``: its last 15 minutes."""

    endpoint: str
    recent: Window
    quarter: Window
    baseline: Baseline | None = None
    totals: Mapping[float, Counts] = field(default_factory=dict)
    queue_age_s: float = 0.0
    slo: ServiceLevel | None = None
    limits: AlertLimits = field(default_factory=AlertLimits)
    findings: Sequence[Finding] = ()


def totals(
    history: EndpointHistory, now: float, windows: Sequence[float] = BURN_WINDOWS
) -> dict[float, Counts]:
    """Return the counts of requests for each window length (seconds) in ``windows``.

    Each window ends at ``now``.
    """
    found = dict.fromkeys(windows, Counts())
    for each in pieces(history, now - max(windows)):
        age = now - each.start
        for seconds, counts in found.items():
            if age <= seconds:
                found[seconds] = Counts(
                    counts.requests + each.requests, counts.failed + each.failed, counts.slow + each.slow
                )
    return found


def pieces(history: EndpointHistory, since: float) -> Iterable[Brief]:
    """Return the history as pieces that do not overlap: ticks, minutes and hours, in any order.

    A tick is the time between two readings of the traffic. All ticks are returned. Minutes and hours are
    returned only if they began at ``since`` or later.
    """
    ticks = [_tick(each) for each in history.ticks]
    oldest = min((each.start for each in ticks), default=float("inf"))
    minutes = [each for each in history.briefs("minute", since) if each.start + 30.0 < oldest]
    first = min([oldest, *(each.start for each in minutes)])
    hours = [each for each in history.briefs("hour", since) if each.start + HOUR <= first]
    return chain(ticks, minutes, hours)


def _tick(window: Window) -> Brief:
    return Brief(window.start, window.requests, window.failed, window.slow, None, None, window.callers)


def baseline(minutes: Iterable[Brief]) -> Baseline | None:
    """Return the baseline of these minutes; None if too few of them have enough answers."""
    found = sorted(each.p99 for each in minutes if each.p99 is not None and each.requests >= LEAST_ANSWERS)
    if len(found) < LEAST_MINUTES:
        return None
    return Baseline(median(found), found[int(0.95 * (len(found) - 1))])


def usual(history: EndpointHistory, now: float) -> Baseline | None:
    """Return the baseline of the last day, without the last 15 minutes."""
    minutes = history.briefs("minute", now - DAY)
    return baseline(each for each in minutes if each.start < now - QUARTER)
