"""The order of chunks: which are passed on, dropped, or break the stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain.chunk_order import ChunkOrder, ChunkPlace

pytestmark = pytest.mark.unit


def test_chunks_in_order_are_passed_on():
    order = ChunkOrder()
    assert not order.emitted
    assert [order.place(0, seq, end=False) for seq in range(3)] == [ChunkPlace.NEXT] * 3
    assert order.emitted
    assert order.place(0, 3, end=True) is ChunkPlace.NEXT


def test_old_chunks_are_dropped():
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
    assert order.place(0, 0, end=True) is ChunkPlace.GAP, "a chunk before the end is missing"


def test_a_later_attempt_before_the_first_chunk_is_accepted():
    order = ChunkOrder()
    assert order.place(2, 0, end=False) is ChunkPlace.NEXT
    assert order.place(1, 0, end=False) is ChunkPlace.OLD, "chunks of the earlier attempt are dropped"
    assert order.place(2, 1, end=True) is ChunkPlace.NEXT


@pytest.mark.parametrize("end", [False, True])
def test_a_later_attempt_after_the_first_chunk_breaks_the_stream(end):
    order = ChunkOrder()
    order.place(0, 0, end=False)
    assert order.place(1, 0, end=end) is ChunkPlace.RESTARTED


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.booleans()), max_size=30))
def test_passed_on_chunks_are_one_attempt_in_order(frames):
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
