"""Acks against a small broker, which knows the unacked tags and accepts none twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.domain.ack_tracker import Ack, AckTracker

pytestmark = pytest.mark.unit


class Broker:
    """The unacked tags as RabbitMQ keeps them: an ack of an unknown tag closes the channel."""

    def __init__(self) -> None:
        self.unsettled: set[int] = set()
        self.acked: list[int] = []

    def take(self, ack: Ack) -> None:
        if ack.multiple:
            settled = sorted(tag for tag in self.unsettled if tag <= ack.tag)
            assert settled, "unknown delivery tag"
        else:
            assert ack.tag in self.unsettled, "unknown delivery tag"
            settled = [ack.tag]
        self.unsettled -= set(settled)
        self.acked += settled


@st.composite
def histories(draw):
    """Draw deliveries (None) and groups of settled tags, in a possible order."""
    open_: list[int] = []
    last, events = 0, []
    for _ in range(draw(st.integers(1, 30))):
        if not open_ or draw(st.booleans()):
            # A consumer without acks shares the channel's tags, so they have gaps.
            last += draw(st.integers(1, 3))
            open_.append(last)
            events.append(("delivered", [last]))
        else:
            done = draw(st.lists(st.sampled_from(open_), min_size=1, max_size=6, unique=True))
            open_ = [tag for tag in open_ if tag not in done]
            events.append(("settled", done))
    return events


@given(histories())
def test_each_tag_is_acked_once_when_it_is_settled(events):
    broker, settling = Broker(), AckTracker()
    delivered: list[int] = []
    done: list[int] = []
    for kind, tags in events:
        if kind == "delivered":
            broker.unsettled |= set(tags)
            delivered += tags
            settling.delivered(tags[0])
            continue
        done += tags
        for ack in settling.settle(list(tags)):
            broker.take(ack)
        assert sorted(broker.acked) == sorted(done)
        assert broker.unsettled == set(delivered) - set(done)
        assert len(settling) == len(broker.unsettled)


@given(histories())
def test_few_acks(events):
    """At most one ack covers all tags below the lowest open one; each other tag gets its own."""
    settling = AckTracker()
    open_: set[int] = set()
    for kind, tags in events:
        if kind == "delivered":
            open_ |= set(tags)
            settling.delivered(tags[0])
            continue
        open_ -= set(tags)
        lowest = min(open_, default=10**9)
        acks = settling.settle(list(tags))
        assert len(acks) == any(t < lowest for t in tags) + sum(t > lowest for t in tags)


def test_a_later_call_does_not_ack_an_earlier_one():
    settling = AckTracker()
    for tag in (1, 2, 3, 4):
        settling.delivered(tag)
    assert settling.settle([3, 2]) == [Ack(2, False), Ack(3, False)]
    assert settling.settle([1]) == [Ack(1, False)]
    assert settling.settle([4]) == [Ack(4, True)]


def test_several_tags_share_an_ack():
    settling = AckTracker()
    for tag in (1, 2, 3, 4, 5):
        settling.delivered(tag)
    assert settling.settle([1, 2, 5]) == [Ack(2, True), Ack(5, False)]


def test_unknown_tags_are_ignored():
    settling = AckTracker()
    settling.delivered(1)
    assert settling.settle([7]) == []
    assert settling.settle([]) == []
    assert settling.settle([1, 7]) == [Ack(1, True)]
    assert settling.settle([1]) == []
    assert len(settling) == 0


def test_a_tag_that_is_settled_twice_is_acked_once():
    settling = AckTracker()
    for tag in (1, 2, 3):
        settling.delivered(tag)
    assert settling.settle([2, 2, 3, 2]) == [Ack(2, False), Ack(3, False)]
    assert settling.settle([1, 1]) == [Ack(1, True)]
