"""Which chunks a stream takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain.chunk_order import ChunkOrder, ChunkPlace

pytestmark = pytest.mark.unit


def test_in_order():
    order = ChunkOrder()
    assert not order.emitted
    assert [order.place(0, seq, end=False) for seq in range(3)] == [ChunkPlace.NEXT] * 3
    assert order.emitted
    assert order.place(0, 3, end=True) is ChunkPlace.NEXT


def test_what_came_before_is_dropped():
    order = ChunkOrder()
    order.place(0, 0, end=False)
    assert order.place(0, 0, end=False) is ChunkPlace.OLD
    assert order.place(0, 1, end=False) is ChunkPlace.NEXT


def test_gaps():
    order = ChunkOrder()
    assert order.place(0, 1, end=False) is ChunkPlace.GAP
    order.place(0, 0, end=False)
    assert order.place(0, 2, end=False) is ChunkPlace.GAP
    assert order.place(0, 2, end=True) is ChunkPlace.GAP
    assert order.place(0, 0, end=True) is ChunkPlace.GAP, "an end that forgets a chunk"


def test_a_later_attempt_before_the_first_chunk_is_taken():
    order = ChunkOrder()
    assert order.place(2, 0, end=False) is ChunkPlace.NEXT
    assert order.place(1, 0, end=False) is ChunkPlace.OLD, "the earlier one is not listened to any more"
    assert order.place(2, 1, end=True) is ChunkPlace.NEXT


@pytest.mark.parametrize("end", [False, True])
def test_a_later_attempt_after_the_first_chunk_breaks_the_stream(end):
    order = ChunkOrder()
    order.place(0, 0, end=False)
    assert order.place(1, 0, end=end) is ChunkPlace.RESTARTED


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.booleans()), max_size=30))
def test_what_is_taken_is_always_one_attempt_in_order(frames):
    order, taken = ChunkOrder(), []
    for attempt, seq, end in frames:
        place = order.place(attempt, seq, end=end)
        if place in (ChunkPlace.GAP, ChunkPlace.RESTARTED):
            break
        if place is ChunkPlace.NEXT:
            taken.append((attempt, seq))
            if end:
                break
    assert len({attempt for attempt, _ in taken}) <= 1
    assert [seq for _, seq in taken] == list(range(len(taken)))
