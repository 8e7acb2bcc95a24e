"""Which requests go into the next model call."""

from __future__ import annotations

from collections import defaultdict
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.domain.backlog import SHARED_S, Backlog, QueuedRequest, UnackedDelivery
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.tenant import tenant_of

pytestmark = pytest.mark.unit

NUMBERS = count()


def item(
    key: bytes = b"k", rows: int = 1, attempt: int = 0, priority: int = 0, tenant: bytes = b""
) -> QueuedRequest:
    id_ = next(NUMBERS).to_bytes(16, "big")
    flags = priority << envelope.PRIORITY_SHIFT
    frame = envelope.request_frame(id_, 0, rows, key, [], tenant=tenant, attempt=attempt, flags=flags)
    return QueuedRequest(envelope.read_request(frame), UnackedDelivery(None, 0, "", 1), 0.0)


def filled(*items: QueuedRequest) -> Backlog:
    backlog = Backlog()
    for each in items:
        backlog.add(each)
    return backlog


def calls(backlog: Backlog, max_rows: int) -> list[list[QueuedRequest]]:
    """Return all calls until the backlog is empty; check its length at each step."""
    found = []
    while len(backlog):
        before = len(backlog)
        group = backlog.take(max_rows)
        assert len(backlog) == before - len(group)
        found.append(group)
    assert backlog.take(max_rows) == []
    assert backlog.oldest() is None
    assert backlog.rows_at_head() == 0
    return found


requests = st.lists(
    st.builds(item, st.sampled_from([b"a", b"b", b"c"]), st.integers(0, 9), st.sampled_from([0, 0, 0, 1, 2])),
    max_size=30,
)


@given(requests, st.integers(0, 12))
def test_every_request_is_called_once_in_the_order_of_its_key(items, max_rows):
    found = calls(filled(*items), max_rows)
    assert sorted(id(i) for group in found for i in group) == sorted(map(id, items))
    by_key: dict[bytes, list[QueuedRequest]] = defaultdict(list)
    for group in found:
        if group[0].request.attempt == 0 and group[0].request.rows:
            by_key[group[0].request.key] += group
    for key, called in by_key.items():
        expected = [i for i in items if i.request.key == key and i.request.attempt == 0 and i.request.rows]
        assert list(map(id, called)) == list(map(id, expected))


@given(requests, st.integers(0, 12))
def test_requests_of_a_call_have_one_key(items, max_rows):
    for group in calls(filled(*items), max_rows):
        assert len({i.request.key for i in group}) == 1
        if len(group) > 1:
            assert sum(i.request.rows for i in group) <= max_rows
            assert all(i.request.rows > 0 and i.request.attempt == 0 for i in group)


@given(requests, st.integers(1, 12))
def test_calls_are_full(items, max_rows):
    """The next request of the key does not fit, or there is none."""
    backlog = filled(*items)
    while len(backlog):
        group = backlog.take(max_rows)
        rows = sum(i.request.rows for i in group)
        assert group
        following = next(
            (
                queue[0]
                for tenant in backlog._tenants.values()
                for line in tenant._queues.values()
                for key, queue in line._by_key.items()
                if key == group[0].request.key and group[0].request.attempt == 0 and group[0].request.rows
            ),
            None,
        )
        assert following is None or rows + following.request.rows > max_rows


@given(requests)
def test_the_head_of_the_queue(items):
    backlog = filled(*items)
    while (oldest := backlog.oldest()) is not None:
        rows = backlog.rows_at_head()
        group = backlog.take(10**9)
        assert group[0] is oldest
        assert sum(i.request.rows for i in group) == rows


def test_a_request_larger_than_a_call_is_called_alone():
    small, large, last = item(rows=1), item(rows=50), item(rows=1)
    assert calls(filled(small, large, last), 8) == [[small], [large], [last]]


def test_keys_take_turns():
    items = [item(b"a", 4) for _ in range(3)] + [item(b"b", 4)]
    found = calls(filled(*items), 4)
    assert [group[0].request.key for group in found] == [b"a", b"b", b"a", b"a"]


def test_without_a_batch_axis_a_request_is_called_alone():
    one, other = item(rows=0), item(rows=0)
    assert calls(filled(one, other), 8) == [[one], [other]]


def test_a_further_attempt_is_called_alone():
    first, again, second = item(), item(attempt=1), item()
    assert calls(filled(first, again, second), 8) == [[first, second], [again]]


def test_a_lower_priority_number_goes_first_and_the_default_is_in_the_middle():
    late, urgent, usual, last = (item(b"abcd"[n : n + 1], priority=p) for n, p in enumerate((7, 1, 0, 5)))
    assert calls(filled(late, urgent, usual, last), 8) == [[urgent], [usual], [last], [late]]


def test_an_urgent_call_is_filled_up_from_other_priorities():
    slow, other, urgent, usual = item(priority=7), item(b"other"), item(priority=1), item(rows=6)
    too_large = item(rows=2, priority=7)
    assert calls(filled(slow, other, urgent, usual, too_large), 8) == [
        [urgent, usual, slow],
        [other],
        [too_large],
    ]


def test_clear():
    backlog = filled(item(), item(b"other"), item(rows=0))
    backlog.clear()
    assert (len(backlog), backlog.take(8), backlog.oldest()) == (0, [], None)
    backlog.add(late := item())
    assert backlog.take(8) == [late]


def test_copies_for_shadow_traffic_go_last_and_share_no_call_with_requests():
    copies = [item(priority=envelope.COPY >> envelope.PRIORITY_SHIFT) for _ in range(2)]
    last, usual = item(priority=envelope.LAST_PRIORITY), item()
    assert filled(*copies, last, usual).copies == 2
    assert calls(filled(*copies, last, usual), 8) == [[usual, last], copies]


def test_tenants_take_turns_and_fill_each_others_calls():
    flood = [item(tenant=b"a") for _ in range(8)]
    backlog = filled(*flood)
    first = backlog.take(2)
    light = item(tenant=b"b")
    backlog.add(light)
    assert first == flood[:2]
    assert backlog.take(2) == [light, flood[2]]
    assert backlog.take(2) == flood[3:5]


def test_a_model_is_shared_for_a_while_after_a_request_of_another_tenant():
    backlog = filled(item(tenant=b"a"), item(tenant=b"a"))
    assert not backlog.shared(0.0)
    backlog.add(item(tenant=b"b"))
    assert backlog.shared(SHARED_S - 0.1)
    assert not backlog.shared(SHARED_S)


def test_a_priority_orders_only_the_requests_of_its_own_tenant():
    pushy = [item(bytes([n]), tenant=b"a", priority=1) for n in range(4)]
    light = [item(b"x", tenant=b"b", priority=7), item(b"y", tenant=b"b", priority=1)]
    order = [group[0] for group in calls(filled(*pushy, *light), 8)]
    assert order.index(light[1]) < order.index(light[0]) < 4


def test_the_weight_in_a_frame_decides_how_many_calls_a_tenant_gets():
    heavy, usual = tenant_of("a", "m", 3), tenant_of("b", "m", 1)
    backlog = filled(*(item(tenant=tenant) for tenant in (heavy, usual) for _ in range(400)))
    served = [backlog.take(1)[0].request.tenant for _ in range(400)]
    assert abs(served.count(heavy) - 300) <= 3


def test_a_tenant_that_always_has_only_one_request_here_gets_no_more_than_its_share():
    backlog = filled(*(item(tenant=b"a") for _ in range(300)), item(tenant=b"b"))
    served = []
    for _ in range(200):
        served += backlog.take(1)
        if served[-1].request.tenant == b"b":
            backlog.add(item(tenant=b"b"))
    assert abs(sum(each.request.tenant == b"b" for each in served) - 100) <= 2
