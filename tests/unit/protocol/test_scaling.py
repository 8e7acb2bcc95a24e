"""Windows of a schedule on the clocks of their zones, and what a Deployment may not say of its scaling."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from tidegate.kernel.protocol.scaling import Scaling, ScheduleWindow

BERLIN = ZoneInfo("Europe/Berlin")


def a_window(start: str, end: str, zone: str = "Europe/Berlin") -> ScheduleWindow:
    return ScheduleWindow(start=start, end=end, time_zone=zone, min_replicas=1)


def at(*when: int, fold: int = 0) -> float:
    return datetime(*when, tzinfo=BERLIN, fold=fold).timestamp()  # type: ignore[arg-type,misc]


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ((2026, 7, 3, 7, 59), False),  # a Friday
        ((2026, 7, 3, 8, 0), True),
        ((2026, 7, 3, 17, 59), True),
        ((2026, 7, 3, 18, 0), False),
        ((2026, 7, 4, 12, 0), False),
        ((2026, 1, 9, 8, 0), True),  # in winter by the same clock
        ((2026, 1, 9, 7, 59), False),
    ],
)
def test_working_hours(when, expected):
    assert a_window("0 8 * * mon-fri", "0 18 * * mon-fri").open_at(at(*when)) == expected


def test_over_midnight_and_over_the_weekend():
    night = a_window("0 22 * * *", "0 6 * * *")
    assert [night.open_at(at(2026, 7, 3, hour)) for hour in (21, 22, 23, 5, 6)] == [
        False, True, True, True, False
    ]  # fmt: skip
    weekend = a_window("0 18 * * fri", "0 6 * * mon")
    assert weekend.open_at(at(2026, 7, 5, 12))
    assert not weekend.open_at(at(2026, 7, 6, 6))


def test_a_time_that_the_clocks_skip_counts_right_after():
    window = a_window("30 2 * * *", "0 18 * * *")
    assert not window.open_at(at(2026, 3, 29, 1, 59))
    assert window.open_at(at(2026, 3, 29, 3, 0)), "02:30 did not come that day"


def test_an_hour_that_comes_twice_opens_once():
    window = a_window("30 2 * * *", "45 2 * * *")
    assert not window.open_at(at(2026, 10, 25, 2, 29))
    assert window.open_at(at(2026, 10, 25, 2, 30))
    assert not window.open_at(at(2026, 10, 25, 2, 45))
    assert not window.open_at(at(2026, 10, 25, 2, 31, fold=1))


def test_zones_differ():
    tokyo, utc = a_window("0 9 * * *", "0 17 * * *", "Asia/Tokyo"), a_window("0 9 * * *", "0 17 * * *", "UTC")
    midnight = datetime(2026, 7, 3, 0, 0, tzinfo=ZoneInfo("UTC")).timestamp()
    assert tokyo.open_at(midnight)
    assert not utc.open_at(midnight)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"start": "0 8 * *"}, "five fields"),
        ({"start": "61 8 * * *"}, "not a cron expression"),
        ({"start": "0 8 31 2 *"}, "not a cron expression"),
        ({"time_zone": "Mars/Olympus"}, "no time zone"),
        ({"time_zone": "../secrets"}, "no time zone"),
        ({"min_replicas": None}, "needs min_replicas"),
        ({"max_replicas": 1, "min_replicas": 2}, "above its max_replicas"),
    ],
)
def test_what_is_no_window(wrong, says):
    right = {"start": "0 8 * * *", "end": "0 18 * * *", "min_replicas": 2}
    with pytest.raises(ValidationError, match=says):
        ScheduleWindow.model_validate({**right, **wrong})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_cost_per_hour": 5.0}, "needs price_per_hour"),
        ({"max_cost_per_hour": 5.0, "price_per_hour": 6.0}, "could never serve"),
        ({"panic_factor": 0.5}, "above 1"),
        ({"target_utilization": 0.0}, "greater than 0"),
        ({"aggressiveness": "brave"}, "economy"),
        ({"backlog": 3}, "Extra inputs"),
    ],
)
def test_what_is_no_scaling(wrong, says):
    with pytest.raises(ValidationError, match=says):
        Scaling.model_validate(wrong)
