"""The history of every endpoint: ticks for half an hour, minutes for two days, hours for five weeks.

A tick is the time between two readings. Minutes and hours with neither requests nor replicas are not kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from services.router.domain.watch.window import Window, merged

Level = Literal["minute", "hour"]
SECONDS: dict[Level, float] = {"minute": 60.0, "hour": 3600.0}
TICKS_S = 1800.0
KEPT: dict[Level, int] = {"minute": 2 * 1440, "hour": 35 * 24}
# The most minutes that are stored for all endpoints together. With many endpoints, each gets a shorter
# history, but at least an hour.
MOST_MINUTES = 120_000


class Brief(NamedTuple):
    """The numbers that alert rules often read, for one minute or one hour.

    Quantiles are in seconds. These numbers are stored beside the JSON of the whole window, so that rules need
    not parse the JSON.
    """

    start: float
    requests: int
    failed: int
    slow: int
    p50: float | None
    p99: float | None
    callers: int = 0


class Stored(NamedTuple):
    """A closed minute or hour, as it is stored on disk."""

    level: Level
    endpoint: str
    start: float
    body: bytes


@dataclass(slots=True)
class _Level:
    open: Window | None = None
    briefs: deque[Brief] = field(default_factory=deque)
    bodies: deque[bytes] = field(default_factory=deque)

    def keep(self, window: Window, body: bytes, most: int) -> None:
        self.briefs.append(brief(window))
        self.bodies.append(body)
        while len(self.briefs) > most:
            self.briefs.popleft()
            self.bodies.popleft()


@dataclass(slots=True)
class EndpointHistory:
    """The history of one endpoint."""

    ticks: deque[Window] = field(default_factory=deque)
    levels: dict[Level, _Level] = field(default_factory=lambda: {"minute": _Level(), "hour": _Level()})

    def briefs(self, level: Level, since: float) -> Iterator[Brief]:
        """Yield the closed minutes or hours that began at ``since`` or later, newest first."""
        for each in reversed(self.levels[level].briefs):
            if each.start < since:
                return
            yield each

    def recent(self, seconds: float, now: float) -> Window:
        """Return the last ``seconds`` as one window."""
        return self.between(now - seconds, now)

    def between(self, start: float, end: float) -> Window:
        """Return the time from ``start`` to ``end`` as one window."""
        return merged(self.pieces(start, end), start, end)

    def pieces(self, start: float, end: float) -> list[Window]:
        """Return the windows from ``start`` to ``end``, oldest first: minutes, then ticks.

        The minutes are those before the oldest tick. A window is included if its middle is between ``start``
        and ``end``.
        """
        ticks = [each for each in self.ticks if start <= _middle(each) < end]
        oldest = self.ticks[0].start if self.ticks else end
        level = self.levels["minute"]
        minutes: list[Window] = []
        for at, body in zip(level.briefs, level.bodies, strict=True):
            if start <= at.start + 30.0 < min(end, oldest):
                minutes.append(Window.from_json(body))
        return [*minutes, *ticks]

    def hours(self, since: float) -> list[Window]:
        """Return the closed hours that began at ``since`` or later, oldest first."""
        level = self.levels["hour"]
        pairs = zip(level.briefs, level.bodies, strict=True)
        return [Window.from_json(body) for at, body in pairs if at.start >= since]


class History:
    """The histories of all endpoints."""

    def __init__(self) -> None:
        self.endpoints: dict[str, EndpointHistory] = {}

    def of(self, endpoint: str) -> EndpointHistory:
        """Return an endpoint's history, which may be empty."""
        found = self.endpoints.get(endpoint)
        if found is None:
            found = self.endpoints[endpoint] = EndpointHistory()
        return found

    def add(self, spans: Mapping[str, Window]) -> list[Stored]:
        """Add a tick to each endpoint. Return the minutes and hours that this tick closes."""
        closed: list[Stored] = []
        for name, window in spans.items():
            history = self.of(name)
            history.ticks.append(window)
            while history.ticks and history.ticks[0].end < window.end - TICKS_S:
                history.ticks.popleft()
            for level in SECONDS:
                closed += self._grow(name, level, window)
        return closed

    def restore(self, stored: Sequence[Stored]) -> list[Stored]:
        """Add stored minutes and hours, oldest first. Return the hours that are missing on the disk.

        When the last router ended, it did not store the hour that was still open. This hour is computed from
        its minutes.
        """
        for each in stored:
            window = Window.from_json(each.body)
            self.of(each.endpoint).levels[each.level].keep(window, each.body, self._most(each.level))
        closed: list[Stored] = []
        for name, history in self.endpoints.items():
            hours, minutes = history.levels["hour"].briefs, history.levels["minute"]
            since = hours[-1].start + SECONDS["hour"] if hours else 0.0
            for at, body in zip(minutes.briefs, minutes.bodies, strict=True):
                if at.start >= since:
                    closed += self._grow(name, "hour", Window.from_json(body))
        return closed

    def keep(self, endpoints: set[str]) -> None:
        """Forget all endpoints except these."""
        self.endpoints = {name: each for name, each in self.endpoints.items() if name in endpoints}

    def _most(self, level: Level) -> int:
        if level == "hour":
            return KEPT[level]
        return max(60, min(KEPT[level], MOST_MINUTES // max(1, len(self.endpoints))))

    def _grow(self, name: str, level: Level, window: Window) -> Iterator[Stored]:
        found = self.of(name).levels[level]
        length = SECONDS[level]
        start = _middle(window) // length * length
        if found.open is not None and found.open.start // length * length != start:
            done, found.open = found.open, None
            if done.requests or done.outcomes or done.replica_s:
                done.start, done.end = done.start // length * length, max(done.end, done.start)
                body = done.to_json()
                found.keep(done, body, self._most(level))
                yield Stored(level, name, done.start, body)
        if found.open is None:
            found.open = Window(max(window.start, start), window.end)
            begin = found.open.start
            found.open.add(window)
            found.open.start = begin
        else:
            found.open.add(window)


def brief(window: Window) -> Brief:
    """Return the numbers that alert rules often read, for one window."""
    return Brief(
        window.start,
        window.requests,
        window.failed,
        window.slow,
        window.quantile_s(0.5),
        window.quantile_s(0.99),
        window.callers,
    )


def _middle(window: Window) -> float:
    return (window.start + window.end) / 2
