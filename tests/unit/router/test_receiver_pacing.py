"""How much goes to one receiver at once, and when what may not go comes back."""

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

PATIENCE = RetryPolicy()
DEAD = WebhookAttempt(None, "no answer", 10_000.0)
WELL = WebhookAttempt(500, "", 100.0)


def lane() -> ReceiverPacing:
    return ReceiverPacing(at_once=4, longest_queue=8)


def fail(found: ReceiverPacing, times: int, now: float = 0.0) -> ReceiverPacing:
    for _ in range(times):
        found.record(DEAD, now, 0.5, PATIENCE)
    return found


def test_some_wait_here_and_the_rest_elsewhere():
    found = lane()
    assert found.postpone(0.0) is None
    found.waiting = 7
    assert found.postpone(0.0) is None
    found.waiting = 8
    assert found.postpone(0.0) == SHORTEST_SLOT_S


def test_each_that_is_put_off_has_a_slot_of_its_own():
    """At the rate at which the receiver answers, so that nobody looks at them before they can go."""
    found = lane()
    found.waiting, found.mean_s = 8, 0.4
    slots = [found.postpone(0.0) for _ in range(5)]
    assert slots == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert found.postpone(0.2) == pytest.approx(0.8)
    for _ in range(100_000):
        last = found.postpone(0.0)
    assert last == pytest.approx(LONGEST_SLOT_S)


def test_so_many_at_once():
    found = lane()
    found.in_flight = 3
    assert found.may_send(0.0)
    found.in_flight = 4
    assert not found.may_send(0.0)


def test_one_alone_asks_a_receiver_that_did_not_answer():
    found = fail(lane(), 1)
    assert found.may_send(0.0)
    assert found.postpone(0.0) is None
    found.in_flight = found.waiting = 1
    assert not found.may_send(0.0)
    assert found.postpone(0.0) is not None


def test_a_dead_receiver_rests_and_everything_for_it_does():
    found = fail(lane(), 3)
    assert found.paused_until == 5.0
    assert not found.may_send(4.9)
    assert found.postpone(0.0) == 5.0
    assert (found.postpone(0.0) or 0.0) > 5.0
    assert found.may_send(5.0)


def test_any_answer_ends_that():
    found = fail(lane(), 5)
    found.record(WELL, 20.0, 0.5, PATIENCE)
    assert found.failures == 0
    assert found.may_send(20.0)
    found.in_flight = 3
    assert found.may_send(20.0)


def test_when_it_is_forgotten():
    found = lane()
    assert found.is_idle(0.0)
    fail(found, 3)
    assert not found.is_idle(5.0 + REMEMBERED_S - 1)
    assert found.is_idle(5.0 + REMEMBERED_S)
    found.waiting = 1
    assert not found.is_idle(1e9)
