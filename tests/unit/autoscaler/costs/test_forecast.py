"""The forecast to the end of the month."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from services.autoscaler.domain.costs.forecast import DAY_S, HOUR_S, forecast

pytestmark = pytest.mark.unit

MONTH = int(datetime(2026, 6, 1, tzinfo=UTC).timestamp())
END = int(datetime(2026, 7, 1, tzinfo=UTC).timestamp())


def weekday(hour: int) -> float:
    return 2.0 if (hour // DAY_S + 3) % 7 < 5 else 0.5


def test_a_weekly_pattern_continues():
    """After five weeks, the rest of the month is expected to look like earlier weeks."""
    now = MONTH + 16 * DAY_S + HOUR_S // 2
    start = MONTH - 20 * DAY_S
    costs = {hour: weekday(hour) for hour in range(start, now - HOUR_S, HOUR_S)}
    costs[int(now // HOUR_S) * HOUR_S] = weekday(now) / 2
    found = forecast(costs, now)
    assert found is not None
    assert found.expected == pytest.approx(sum(weekday(hour) for hour in range(MONTH, END, HOUR_S)), rel=1e-3)
    assert found.low == pytest.approx(found.expected, rel=0.01), "nothing varies"
    assert found.until == END


def test_the_interval_holds_in_most_months():
    """Whole days vary at random: the real cost is in the interval in about 8 of 10 months."""
    inside = 0
    for seed in range(60):
        draw = random.Random(seed)
        days = {day: draw.uniform(0.5, 1.5) for day in range(MONTH // DAY_S - 25, END // DAY_S)}
        cost = {hour: days[hour // DAY_S] for hour in range(MONTH - 25 * DAY_S, END, HOUR_S)}
        now = MONTH + 12 * DAY_S
        found = forecast({hour: each for hour, each in cost.items() if hour < now}, now)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= sum(cost[hour] for hour in range(MONTH, END, HOUR_S)) <= found.high
    assert 40 <= inside <= 58


def test_a_short_history_has_no_interval():
    now = MONTH + 10 * HOUR_S
    found = forecast({MONTH + hour * HOUR_S: 1.0 for hour in range(10)}, now)
    assert found is not None
    assert found.low is None
    assert found.expected == pytest.approx(30 * 24)
    assert "10 hours only" in found.basis


def test_no_history():
    assert forecast({}, MONTH + 5.0) is None
