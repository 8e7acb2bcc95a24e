"""The input of a diagnosis: an endpoint's last minutes, earlier periods, and full days. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import NamedTuple

from services.router.domain.alerts.facts import pieces
from services.router.domain.watch.history import EndpointHistory
from services.router.domain.watch.window import Window, merged

# With fewer requests, the latencies and rates of a period mean little.
LEAST_REQUESTS = 30
LEAST_BLOCKS = 3


@dataclass(frozen=True, slots=True)
class Spans:
    """The lengths of the periods that a diagnosis compares, in seconds (``recent_days``: in days).

    The last ``window_s`` seconds are compared with earlier periods of the same length. These periods are in
    the ``past_s`` seconds before. The last ``recent_days`` full days are compared with earlier days.
    ``day_s``: the length of a day.
    """

    window_s: float = 900.0
    past_s: float = 86_400.0
    day_s: float = 86_400.0
    recent_days: int = 7


class Day(NamedTuple):
    """One full day: distinct callers, requests, and failed requests."""

    start: float
    callers: int
    requests: int
    failed: int


@dataclass(frozen=True, slots=True)
class DeploymentFacts:
    """The facts about one Deployment of the endpoint.

    ``override``: the number of replicas that an operator set, or None. ``host_full``: True if no more
    replicas fit on the hosts.
    """

    name: str
    model: str = ""
    version: int = 1
    low: int = 1
    high: int = 1
    ready: int = 0
    desired: int = 0
    override: int | None = None
    host_full: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """All data that a diagnosis of one endpoint reads. ``blocks``: past periods, oldest first.

    ``thirds``: the last minutes in three parts of equal length. A symptom must show in at least two of them,
    because a short burst is no symptom.
    """

    endpoint: str
    recent: Window
    blocks: Sequence[Window] = ()
    days: Sequence[Day] = ()
    deployments: Sequence[DeploymentFacts] = ()
    spans: Spans = field(default_factory=Spans)
    thirds: Sequence[Window] = ()

    @property
    def main(self) -> DeploymentFacts:
        """Return the Deployment that answered the most requests; if none answered, return the first one."""
        answered = self.recent.answered_by
        found = max(self.deployments, key=lambda each: answered.get(each.name, 0), default=None)
        return found or DeploymentFacts(self.endpoint)

    @property
    def past(self) -> list[Window]:
        """Return the past blocks with enough requests."""
        return [block for block in self.blocks if block.requests >= LEAST_REQUESTS]

    @property
    def before(self) -> Window:
        """Return all blocks of :attr:`past` as one window."""
        return merged(self.past, self.recent.start, self.recent.start)

    @property
    def learning(self) -> str:
        """Return what is missing for a comparison with the past; empty if nothing is missing."""
        if len(self.past) < LEAST_BLOCKS:
            length = f"{self.spans.window_s / 60:g} min"
            return (
                f"the past has {len(self.past)} spans of {length} with at least {LEAST_REQUESTS} requests; "
                f"{LEAST_BLOCKS} such spans are needed"
            )
        return ""

    def lasts(self, has: Callable[[Window], bool]) -> bool:
        """Return True if ``has`` is true for at least two of the three parts of the last minutes."""
        return not self.thirds or sum(map(has, self.thirds)) >= len(self.thirds) - 1

    @property
    def comparable(self) -> bool:
        """Return True if the last minutes can be compared with the past."""
        return not self.learning and self.recent.requests >= LEAST_REQUESTS


def case_of(
    endpoint: str,
    history: EndpointHistory,
    deployments: Sequence[DeploymentFacts],
    spans: Spans,
    now: float,
) -> Case:
    """Collect the input of an endpoint's diagnosis. ``now``: the time of the last reading."""
    begin = now - spans.window_s
    recent = history.between(begin, now)
    third = spans.window_s / 3
    thirds = [history.between(begin + part * third, begin + (part + 1) * third) for part in range(3)]
    count = int(spans.past_s // spans.window_s)
    groups: dict[int, list[Window]] = {}
    for each in history.pieces(begin - count * spans.window_s, begin):
        number = int((begin - (each.start + each.end) / 2) // spans.window_s)
        groups.setdefault(number, []).append(each)
    blocks = [merged(groups[number], begin, begin) for number in sorted(groups, reverse=True)]
    return Case(endpoint, recent, blocks, days_of(history, spans, now), deployments, spans, thirds)


def days_of(history: EndpointHistory, spans: Spans, now: float) -> list[Day]:
    """Return the full days of the history, oldest first.

    The first day with a request and the current day are left out, because they are not full.
    """
    found: dict[int, Day] = {}
    for each in pieces(history, float("-inf")):
        number = int(each.start // spans.day_s)
        day = found.get(number, Day(number * spans.day_s, 0, 0, 0))
        found[number] = Day(
            day.start,
            max(day.callers, each.callers),
            day.requests + each.requests,
            day.failed + each.failed,
        )
    today = int(now // spans.day_s)
    days = [found[number] for number in sorted(found) if number != today]
    return list(dropwhile(lambda day: not day.requests, days))[1:]
