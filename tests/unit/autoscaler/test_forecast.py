"""Test the forecast from earlier days and weeks."""

from __future__ import annotations

import math

import pytest

from services.autoscaler.domain.forecast import expected

DAY, WEEK = 24 * 60, 7 * 24 * 60


def days(count: int, rate: float = 60.0, swing: float = 0.9) -> dict[int, int]:
    """Return arrivals by minute that rise and fall with the hour."""
    return {m: round(rate * (1 - swing * math.cos(2 * math.pi * m / DAY))) for m in range(count * DAY)}


def test_two_seasons_are_needed():
    history = days(3)
    assert expected(history, 0, "off", 3 * DAY * 60.0, 60.0) is None
    assert expected(history, 0, "daily", 1.9 * DAY * 60.0, 60.0) is None
    assert expected(history, 0, "daily", 3 * DAY * 60.0, 60.0) is not None
    assert expected(history, 0, "weekly", 3 * DAY * 60.0, 60.0) is None


@pytest.mark.parametrize("hour", [0, 6, 9, 12, 18])
def test_it_says_what_the_same_time_brought(hour):
    history = days(5)
    now = (4 * DAY + hour * 60) * 60.0
    past = {m: n for m, n in history.items() if m < now / 60}
    said = expected(past, 0, "daily", now, 0.0)
    assert said == pytest.approx(history[4 * DAY + hour * 60] / 60, rel=0.1, abs=0.1)


def test_it_looks_ahead_by_what_a_start_takes():
    history = days(4)
    now = (3 * DAY + 6 * 60) * 60.0
    soon, later = expected(history, 0, "daily", now, 0.0), expected(history, 0, "daily", now, 3 * 3600.0)
    assert soon is not None
    assert later is not None
    assert later > 1.4 * soon


def test_a_busier_day_lifts_it_within_limits():
    history = days(4)
    now = (3 * DAY + 12 * 60) * 60.0
    usual = expected(history, 0, "daily", now, 0.0)
    busy = {m: n * 10 if m >= 3 * DAY else n for m, n in history.items() if m < now / 60}
    assert usual is not None
    assert expected(busy, 0, "daily", now, 0.0) == pytest.approx(2 * usual, rel=0.01)
    quiet = {m: n for m, n in history.items() if m < 3 * DAY}
    assert expected(quiet, 0, "daily", now, 0.0) == pytest.approx(usual / 2, rel=0.01)


def test_weeks_differ_by_their_days():
    busy_day = {m: 600 for w in range(4) for m in range(w * WEEK + DAY, w * WEEK + 2 * DAY)}
    history = dict.fromkeys(range(3 * WEEK), 10) | {m: n for m, n in busy_day.items() if m < 3 * WEEK}
    before = (3 * WEEK + DAY - 1) * 60.0
    said = expected(history | dict.fromkeys(range(3 * WEEK, 3 * WEEK + DAY), 10), 0, "weekly", before, 600.0)
    assert said == pytest.approx(10.0, rel=0.05)
