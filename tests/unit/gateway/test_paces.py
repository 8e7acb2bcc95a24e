"""The limit of events per second of each caller."""

from __future__ import annotations

import pytest

from services.gateway.domain.paces import BURST_S, MOST_CALLERS, Paces
from tidegate.kernel.errors import TooMany

pytestmark = pytest.mark.unit


def test_a_caller_above_its_pace_waits_and_others_do_not():
    paces = Paces(100, "events")
    for _ in range(int(BURST_S)):
        paces.check("loud", 100, now=0.0)
    with pytest.raises(TooMany, match="more than 100 events per second") as found:
        paces.check("loud", 1, now=0.0)
    assert found.value.retry_after_s == pytest.approx(0.01)
    paces.check("calm", 100, now=0.0)
    paces.check("loud", 1, now=0.02)


def test_one_large_call_passes_and_is_paid_for_later():
    paces = Paces(100, "events")
    paces.check("a", 1000, now=0.0)
    with pytest.raises(TooMany) as found:
        paces.check("a", 1, now=0.0)
    assert found.value.retry_after_s == pytest.approx(5.01)
    paces.check("a", 1, now=5.1)


def test_callers_are_forgotten_in_the_order_of_their_last_call():
    paces = Paces(1, "events")
    paces.check("first", 10, now=0.0)
    for n in range(MOST_CALLERS):
        paces.check(str(n), 1, now=0.0)
    paces.check("first", 1, now=0.0)
