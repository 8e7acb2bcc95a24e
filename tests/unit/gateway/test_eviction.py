"""The choice of unfinished bodies to drop when memory is short."""

from __future__ import annotations

import pytest

from services.gateway.domain.eviction import Unfinished, choose
from services.gateway.domain.memory_budget import MemoryBudget

pytestmark = pytest.mark.unit

PACE = 1000
STANDING = Unfinished(100, 5.0, 0, False)
DRIPPING = Unfinished(100, 5.0, 10, False)
FAST = Unfinished(100, 5.0, 50_000, False)
NEW = Unfinished(100, 0.2, 0, False)
KNOWN_STANDING = STANDING._replace(known=True)
KNOWN_NEW = NEW._replace(known=True)
EVERY = [KNOWN_NEW, FAST, NEW, KNOWN_STANDING, DRIPPING, STANDING]


def chosen(need: int, *, for_known: bool) -> list[Unfinished]:
    return [EVERY[at] for at in choose(EVERY, need, PACE, for_known=for_known)]


def test_an_unknown_caller_evicts_only_slow_bodies():
    assert chosen(10_000, for_known=False) == [STANDING, DRIPPING, KNOWN_STANDING]


def test_a_caller_with_a_credential_evicts_those_without():
    assert chosen(10_000, for_known=True) == [STANDING, DRIPPING, FAST, NEW, KNOWN_STANDING]


@pytest.mark.parametrize(("need", "count"), [(1, 1), (100, 1), (101, 2), (300, 3)])
def test_no_more_than_is_needed(need, count):
    assert len(chosen(need, for_known=False)) == count


def test_an_empty_body_is_not_evicted():
    assert choose([STANDING._replace(held=0)], 1, PACE, for_known=True) == []


@pytest.mark.parametrize("known", [False, True])
def test_a_budget_reclaims_memory_before_it_refuses(known):
    budget, asked = MemoryBudget(100), []

    def reclaim(need: int, for_known: bool) -> None:
        asked.append((need, for_known))
        budget.release(30)

    budget.reclaim = reclaim
    budget.force(80)
    assert budget.take(5, known=known)
    assert asked == []
    assert budget.take(30, known=known)
    assert asked == [(15, known)]
    assert not budget.take(60, known=known)
