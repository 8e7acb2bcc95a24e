"""How often a request is tried."""

from __future__ import annotations

import pytest

from services.worker.domain.attempts import (
    AGAIN,
    EXHAUSTED,
    GIVE_UP,
    MAX_ATTEMPTS,
    NOT_RETRIED,
    next_step,
)
from services.worker.domain.phases import Phases

pytestmark = pytest.mark.unit


def test_a_request_is_tried_as_often_as_said():
    attempt, tries = 0, 1
    while next_step(attempt, safe=True) == AGAIN:
        attempt, tries = attempt + 1, tries + 1
    assert tries == MAX_ATTEMPTS
    assert next_step(attempt, safe=True) == EXHAUSTED
    assert next_step(255, safe=True) == EXHAUSTED


@pytest.mark.parametrize("attempt", range(4))
def test_what_may_not_run_twice_does_not(attempt):
    assert next_step(attempt, safe=False) == NOT_RETRIED


def test_giving_up():
    assert {EXHAUSTED, NOT_RETRIED} == GIVE_UP
    assert AGAIN not in GIVE_UP


def test_phases():
    now = [10.0]
    phases = Phases(lambda: now[0])
    with phases.measure("load"):
        now[0] += 1.25

    def crash() -> None:
        with phases.measure("warm_up"):
            now[0] += 0.5
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash()
    phases.record("launch", -3.0)
    assert phases.ms == {"load": 1250.0, "warm_up": 500.0, "launch": 0.0}
