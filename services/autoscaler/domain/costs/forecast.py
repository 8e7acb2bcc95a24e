"""Forecast the cost up to the end of the month, from the mean cost of the same hours of earlier weeks.

With at least two weeks of costs, the expected cost of an hour is the mean of the same hour of the week. With
at least two days, it is the mean of the same hour of the day. With less than two days, it is the mean of all
hours.

With at least three whole days of costs, the forecast has an interval. The cost is in this interval in 8 of 10
months, if the days' differences from their expected costs are independent.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from services.autoscaler.domain.costs.budgets import month_end, periods

HOUR_S, DAY_S, WEEK_S = 3600, 86_400, 604_800
# Older costs are not used, because they say little about the future.
HISTORY_S = 5 * WEEK_S
FEWEST_DAYS = 3
# In a normal distribution, 80 % of the values are at most this many standard deviations from the mean.
Z = 1.2816


@dataclass(frozen=True, slots=True)
class MonthForecast:
    """The cost of the current month, as a forecast.

    ``spent``: the cost until now. ``expected``: the cost of the whole month. ``low`` and ``high``: the bounds
    of the 80 % interval; None if it is not known. ``basis``: the data that the forecast uses, in words.
    ``until``: the end of the month.
    """

    spent: float
    expected: float
    low: float | None
    high: float | None
    basis: str
    until: float

    def view(self) -> dict[str, Any]:
        """Return the forecast for JSON."""
        return asdict(self)


def forecast(costs: Mapping[int, float], now: float) -> MonthForecast | None:
    """Forecast the cost of the current month. Return None before the first whole hour with costs.

    ``costs`` has the cost of each hour, by its beginning in seconds since the epoch. From the first hour in
    ``costs`` on, a missing hour costs 0.
    """
    current = int(now // HOUR_S) * HOUR_S
    first = max(min(costs, default=current), current - HISTORY_S)
    history = {hour: costs.get(hour, 0.0) for hour in range(first, current, HOUR_S)}
    if not history:
        return None
    expected_of = _expectation(history)
    end = month_end(now)
    spent = sum(cost for hour, cost in costs.items() if hour >= periods(now)[1])
    rest = expected_of(current) * (current + HOUR_S - now) / HOUR_S
    rest += sum(expected_of(hour) for hour in range(current + HOUR_S, int(end), HOUR_S))
    spread, days = _spread(history, expected_of)
    half = None
    if spread is not None:
        left = (end - now) / DAY_S
        half = Z * spread * math.sqrt(left * (1 + left / days))
    return MonthForecast(
        spent=spent,
        expected=spent + rest,
        low=None if half is None else max(spent, spent + rest - half),
        high=None if half is None else spent + rest + half,
        basis=_words(len(history), days if half is not None else 0),
        until=end,
    )


def _expectation(history: Mapping[int, float]) -> Callable[[int], float]:
    weekly: dict[int, list[float]] = defaultdict(list)
    daily: dict[int, list[float]] = defaultdict(list)
    for hour, cost in history.items():
        weekly[hour % WEEK_S].append(cost)
        daily[hour % DAY_S].append(cost)
    weeks = {place: fmean(found) for place, found in weekly.items()}
    days = {place: fmean(found) for place, found in daily.items()}
    overall = fmean(history.values())
    # In the first two weeks, many hours of the week have occurred only once. Their means say little.
    use_weeks = len(history) * HOUR_S >= 2 * WEEK_S
    use_days = len(history) * HOUR_S >= 2 * DAY_S

    def expected(hour: int) -> float:
        if use_weeks and hour % WEEK_S in weeks:
            return weeks[hour % WEEK_S]
        return days.get(hour % DAY_S, overall) if use_days else overall

    return expected


def _spread(history: Mapping[int, float], expected_of: Callable[[int], float]) -> tuple[float | None, int]:
    """Return how far whole days' costs deviate from the expected costs, and how many whole days there are.

    The deviation is the standard deviation; None if there are too few whole days.
    """
    off: dict[int, float] = defaultdict(float)
    hours: dict[int, int] = defaultdict(int)
    for hour, cost in history.items():
        day = hour // DAY_S
        off[day] += cost - expected_of(hour)
        hours[day] += 1
    whole = [off[day] for day, count in hours.items() if count == DAY_S // HOUR_S]
    if len(whole) < FEWEST_DAYS:
        return None, 0
    return math.sqrt(sum(each * each for each in whole) / (len(whole) - 1)), len(whole)


def _words(hours: int, days: int) -> str:
    if days:
        return f"the costs of {hours / 24:.0f} days, by hour of the {'week' if hours >= 336 else 'day'}"
    return f"the costs of {hours} hours only, so there is no interval"
