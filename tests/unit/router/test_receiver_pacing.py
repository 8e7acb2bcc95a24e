"""How many webhooks one receiver gets at once, and when postponed ones return."""

from __future__ import annotations

import pytest

from services.router.domain.receiver_pacing import (
    LONGEST_SLOT_S,
    REMEMBERED_S,
    SHORTEST_SLOT_S,
    ReceiverPacing,
)
from services.router.domain.webhooks import RetryPolicy, WebhookAttempt

pytestmark = pytest.mark.unit

POLICY = RetryPolicy()
DEAD = WebhookAttempt(None, "no answer", 10_000.0)
WELL = WebhookAttempt(500, "", 100.0)


def new_pacing() -> ReceiverPacing:
    return ReceiverPacing(max_in_flight=4, longest_queue=8)


def fail(pacing: ReceiverPacing, times: int, now: float = 0.0) -> ReceiverPacing:
    for _ in range(times):
        pacing.record(DEAD, now, 0.5, POLICY)
    return pacing


def test_the_queue_is_bounded():
    pacing = new_pacing()
    assert pacing.postpone(0.0) is None
    pacing.waiting = 7
    assert pacing.postpone(0.0) is None
    pacing.waiting = 8
    assert pacing.postpone(0.0) == SHORTEST_SLOT_S


def test_each_postponed_webhook_has_its_own_slot():
    """Slots follow the receiver's pace, so that no webhook is claimed before it can be sent."""
    pacing = new_pacing()
    pacing.waiting, pacing.mean_s = 8, 0.4
    slots = [pacing.postpone(0.0) for _ in range(5)]
    assert slots == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert pacing.postpone(0.2) == pytest.approx(0.8)
    for _ in range(100_000):
        last = pacing.postpone(0.0)
    assert last == pytest.approx(LONGEST_SLOT_S)


def test_attempts_in_flight_are_bounded():
    pacing = new_pacing()
    pacing.in_flight = 3
    assert pacing.may_send(0.0)
    pacing.in_flight = 4
    assert not pacing.may_send(0.0)


def test_a_single_attempt_tests_a_receiver_that_did_not_answer():
    pacing = fail(new_pacing(), 1)
    assert pacing.may_send(0.0)
    assert pacing.postpone(0.0) is None
    pacing.in_flight = pacing.waiting = 1
    assert not pacing.may_send(0.0)
    assert pacing.postpone(0.0) is not None


def test_a_dead_receiver_is_paused():
    pacing = fail(new_pacing(), 3)
    assert pacing.paused_until == 5.0
    assert not pacing.may_send(4.9)
    assert pacing.postpone(0.0) == 5.0
    assert (pacing.postpone(0.0) or 0.0) > 5.0
    assert pacing.may_send(5.0)


def test_any_response_ends_the_pause():
    pacing = fail(new_pacing(), 5)
    pacing.record(WELL, 20.0, 0.5, POLICY)
    assert pacing.failures == 0
    assert pacing.may_send(20.0)
    pacing.in_flight = 3
    assert pacing.may_send(20.0)


def test_when_a_receiver_is_forgotten():
    pacing = new_pacing()
    assert pacing.is_idle(0.0)
    fail(pacing, 3)
    assert not pacing.is_idle(5.0 + REMEMBERED_S - 1)
    assert pacing.is_idle(5.0 + REMEMBERED_S)
    pacing.waiting = 1
    assert not pacing.is_idle(1e9)
