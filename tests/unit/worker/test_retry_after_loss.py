"""How often a request may run."""

from __future__ import annotations

import pytest

from services.worker.domain.phases import Phases
from services.worker.domain.retry_after_loss import (
    AGAIN,
    EXHAUSTED,
    GIVE_UP,
    MAX_ATTEMPTS,
    NOT_RETRIED,
    after_loss,
)

pytestmark = pytest.mark.unit


def test_two_losses_alone_give_a_request_up():
    """The first loss, beside other requests, is charged to none of them."""
    assert after_loss(0, alone=False, safe=True) == (AGAIN, 1)
    assert after_loss(1, alone=True, safe=True) == (AGAIN, 2)
    assert after_loss(2, alone=True, safe=True) == (EXHAUSTED, MAX_ATTEMPTS)
    assert after_loss(255, alone=True, safe=True)[0] == EXHAUSTED


def test_a_loss_alone_is_charged_from_the_first_attempt_on():
    assert after_loss(0, alone=True, safe=True) == (AGAIN, 2)


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_loss_beside_others_is_never_charged(attempt):
    assert after_loss(attempt, alone=False, safe=True) == (AGAIN, attempt)


@pytest.mark.parametrize("attempt", range(4))
@pytest.mark.parametrize("alone", [True, False])
def test_an_unsafe_request_is_not_retried(attempt, alone):
    assert after_loss(attempt, alone=alone, safe=False)[0] == NOT_RETRIED


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
