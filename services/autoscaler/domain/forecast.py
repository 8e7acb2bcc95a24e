"""Forecast arrivals from earlier days or weeks. A forecast only adds replicas, it never removes any.

The method is a seasonal average with a level correction. A season is a day or a week.

The average is a weighted mean of the rates at the same time in earlier seasons. Each rate is the mean of five
minutes around that time. Each season counts half as much as the season after it.

The average is multiplied by the level: the arrivals in the last half hour, divided by the average for that
half hour. The level is limited to between 0.5 and 2. A forecast needs two recorded seasons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tidegate.kernel.protocol.scaling import Season

MINUTE_S = 60
SEASON_MINUTES: dict[Season, int] = {"daily": 24 * 60, "weekly": 7 * 24 * 60}
SEASONS_USED: dict[Season, int] = {"daily": 7, "weekly": 4}
FEWEST_SEASONS = 2
AROUND_MINUTES = 2
LEVEL_MINUTES = 30
LEVEL_LIMIT = 2.0

# Arrivals by minute since the epoch. Minutes without arrivals may be missing.
Minutes = Mapping[int, int]


def expected(history: Minutes, first: int, season: Season, now: float, ahead_s: float) -> float | None:
    """Return the highest forecast rate (requests per second) in the next ``ahead_s`` seconds.

    ``first``: the minute since the epoch in which ``history`` begins. Return None if the forecast is off, or
    if ``history`` is too short.
    """
    if season == "off":
        return None
    current = int(now // MINUTE_S)
    length = SEASON_MINUTES[season]
    seasons = min(SEASONS_USED[season], (current - first - LEVEL_MINUTES) // length)
    if seasons < FEWEST_SEASONS:
        return None
    weights = [0.5**back for back in range(seasons)]
    minutes = range(current, current + int(ahead_s // MINUTE_S) + 2)
    rate = max(_average(history, minute, length, weights, AROUND_MINUTES) for minute in minutes)
    return rate * _level(history, current, length, weights) / MINUTE_S


def _average(history: Minutes, minute: int, length: int, weights: Sequence[float], around: int) -> float:
    """Return the weighted mean of arrivals per minute, at the time of ``minute`` in earlier seasons.

    ``length``: the minutes of a season. ``weights``: a weight for each earlier season, the latest first.
    ``around``: this many minutes before and after the minute also count.
    """
    total = 0.0
    for back, weight in enumerate(weights, start=1):
        middle = minute - back * length
        seen = sum(history.get(m, 0) for m in range(middle - around, middle + around + 1))
        total += weight * seen / (2 * around + 1)
    return total / sum(weights)


def _level(history: Minutes, current: int, length: int, weights: Sequence[float]) -> float:
    recent = range(current - LEVEL_MINUTES, current)
    average = sum(_average(history, minute, length, weights, 0) for minute in recent)
    if average <= 0:
        return 1.0
    return min(LEVEL_LIMIT, max(1 / LEVEL_LIMIT, sum(history.get(m, 0) for m in recent) / average))
