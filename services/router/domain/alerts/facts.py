"""The facts about one endpoint that the rules of alerts read. Pure."""

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
# The windows of burn rates, as in chapter 5 of Google's SRE workbook.
BURN_WINDOWS = (FIVE_MINUTES, 1800.0, HOUR, 6 * HOUR, 3 * DAY)
# A minute with fewer answers has no useful 99th percentile, and a baseline needs this many minutes.
LEAST_ANSWERS = 50
LEAST_MINUTES = 30

FindingRule = Literal["Drift", "QualityDrop", "CostCap"]


class Counts(NamedTuple):
    """Requests of a span: all, failed, and answered too slowly."""

    requests: int = 0
    failed: int = 0
    slow: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding of another part, such as the drift of a feature. ``subject``: what it is about."""

    rule: FindingRule
    endpoint: str
    subject: str
    value: float
    limit: float
    summary: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """An endpoint's usual 99th percentile in seconds: the median of its minutes, and one that few exceed."""

    p99_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class Facts:
    """One endpoint now. ``recent``: the last five minutes, ``quarter``: the last fifteen."""

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
    """Return the counts of each window, from ticks, then minutes, then hours."""
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
    """Return the spans of the past without an overlap, in any order."""
    ticks = [_tick(each) for each in history.ticks]
    oldest = min((each.start for each in ticks), default=float("inf"))
    minutes = [each for each in history.briefs("minute", since) if each.start + 30.0 < oldest]
    first = min([oldest, *(each.start for each in minutes)])
    hours = [each for each in history.briefs("hour", since) if each.start + HOUR <= first]
    return chain(ticks, minutes, hours)


def _tick(window: Window) -> Brief:
    return Brief(window.start, window.requests, window.failed, window.slow, None, None, window.callers)


def baseline(minutes: Iterable[Brief]) -> Baseline | None:
    """Return the usual 99th percentile of these minutes; None: there are too few with enough answers."""
    found = sorted(each.p99 for each in minutes if each.p99 is not None and each.requests >= LEAST_ANSWERS)
    if len(found) < LEAST_MINUTES:
        return None
    return Baseline(median(found), found[int(0.95 * (len(found) - 1))])


def usual(history: EndpointHistory, now: float) -> Baseline | None:
    """Return the baseline of the last day, without the last quarter of an hour."""
    minutes = history.briefs("minute", now - DAY)
    return baseline(each for each in minutes if each.start < now - QUARTER)
