"""The ledger's arithmetic: missing jobs, and jobs that only moved during a reading."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.router.domain.ledger import (
    Discrepancy,
    LedgerReading,
    LedgerReport,
    confirmed,
    discrepancy,
    lost_messages,
)
from tidegate.kernel.protocol.jobs import STATES, Counts, JobLoad

pytestmark = pytest.mark.unit


def reading(
    *,
    ledger: dict[str, int] | None = None,
    waiting: int = 0,
    running: int = 0,
    ready: int = 0,
    held: int = 0,
    before: int | None = None,
    **given: Any,
) -> LedgerReading:
    """Return a reading of one Deployment; ``before`` None: no job arrived meanwhile."""
    sums = ledger if ledger is not None else {"accepted": waiting + running}
    states = dict.fromkeys(STATES, 0) | {"queued": waiting, "running": running}
    counts = Counts(states, {"d": JobLoad(waiting, running)}, sums, given.pop("acknowledged", {}), **given)
    accepted = sums.get("accepted", 0)
    return LedgerReading(accepted if before is None else before, counts, {"d": ready}, {"d": held})


def test_an_empty_ledger_misses_nothing():
    assert discrepancy(reading()).total == 0


def test_waiting_jobs_are_ready_or_held():
    assert discrepancy(reading(waiting=5, running=2, ready=4, held=3)).total == 0
    assert discrepancy(reading(waiting=5, running=2, ready=3, held=3)) == Discrepancy(0, 0, 1, {"d": True})


def test_more_messages_than_jobs_are_duplicates_and_no_loss():
    assert discrepancy(reading(waiting=1, ready=5)).total == 0


def test_a_surplus_of_another_deployment_hides_no_loss():
    counts = Counts(
        dict.fromkeys(STATES, 0) | {"queued": 2},
        {"a": JobLoad(1, 0), "b": JobLoad(1, 0)},
        {"accepted": 2},
        {},
    )
    assert discrepancy(LedgerReading(2, counts, {"a": 5}, {})).messages == 1


def test_leased_jobs_need_no_message():
    assert discrepancy(reading(running=2, watched=2)).total == 0


def test_jobs_that_arrived_meanwhile_are_not_counted():
    assert discrepancy(reading(waiting=7, ready=4, before=4)).total == 0
    assert discrepancy(reading(waiting=7, ready=3, before=4)).messages == 1


def test_an_acknowledged_job_without_a_record():
    sums = {"accepted": 3, "succeeded": 3}
    assert discrepancy(reading(ledger=sums, acknowledged={"g": 2, "h": 1})).total == 0
    assert discrepancy(reading(ledger=sums, acknowledged={"g": 2, "h": 2})) == Discrepancy(1, 0, 0)


def test_every_accepted_job_is_over_or_unfinished_once():
    sums = {"accepted": 9, "succeeded": 2, "failed": 2, "cancelled": 1, "expired": 1, "removed": 4}
    assert discrepancy(reading(ledger=sums, waiting=3, ready=3)).total == 0
    assert discrepancy(reading(ledger=sums, waiting=2, ready=2)) == Discrepancy(0, 1, 0)
    assert discrepancy(reading(ledger=sums, waiting=4, ready=4)) == Discrepancy(0, -1, 0)
    assert discrepancy(reading(ledger=sums, waiting=4, ready=4)).total == 1


@pytest.mark.parametrize(
    ("totals", "reported"),
    [([], 0), ([4], 0), ([4, 4], 0), ([4, 6, 5], 4), ([9, 9, 9, 0], 0), ([0, 3, 3, 3], 3)],
)
def test_only_jobs_that_several_readings_miss_are_reported(totals, reported):
    assert confirmed([Discrepancy(0, 0, total) for total in totals]) == reported


def test_where_messages_are_lost():
    seen = discrepancy(reading(waiting=5, ready=4))
    assert seen.where == {"d": True}
    assert discrepancy(reading(waiting=5)).where == {"d": False}
    assert lost_messages([seen, seen]) == {}
    assert lost_messages([seen, seen, seen]) == {"d": True}
    assert lost_messages([seen, discrepancy(reading(waiting=5, ready=5)), seen]) == {}
    elsewhere = Discrepancy(0, 0, 1, {"e": True})
    assert lost_messages([elsewhere, seen, seen]) == {}


def test_unknown_is_not_zero():
    unknown = LedgerReport(1.5, None, {"broker": "away"})
    assert math.isnan(unknown.gauge)
    assert unknown.to_json() == {"at": 1.5, "unaccounted": None, "away": {"broker": "away"}}


def test_as_json():
    sums = {"accepted": 9, "succeeded": 4, "removed": 1}
    seen = reading(ledger=sums, waiting=4, running=1, ready=3, held=2, acknowledged={"g": 8}, watched=1)
    to_json = LedgerReport(1.0, 0, {}, seen, discrepancy(seen)).to_json()
    assert to_json["unaccounted"] == 0
    assert (to_json["acknowledged"], to_json["accepted"]) == (8, 9)
    assert to_json["over"]["succeeded"] == 4
    assert to_json["unfinished"] == {"accepting": 0, "queued": 4, "running": 1}
    assert to_json["messages"] == {"ready": 3, "held": 2, "watched": 1}
    assert to_json["missing"] == {"records": 0, "endings": 0, "messages": 0}
