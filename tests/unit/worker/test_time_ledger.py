"""A replica's time is divided among calls, idle time, start-up and waste, and the parts sum exactly."""

from __future__ import annotations

import random

import pytest

from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from services.worker.domain.time_ledger import MOST_TENANTS, TimeLedger
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.protocol.replica_time import BUSY, IDLE, STARTING, WASTED, Part, ReplicaTime, Spent

pytestmark = pytest.mark.unit

NEVER_MS = 2**62


class Clock:
    def __init__(self) -> None:
        self.ns = 1_000

    def __call__(self) -> int:
        return self.ns


def a_request(
    tenant: str = "ann\x1fdigits\x1f1", rows: int = 1, deadline_ms: int = NEVER_MS, id: bytes = b""
) -> QueuedRequest:
    request = Request(id, deadline_ms, rows, 0, 0, tenant.encode(), b"", b"", [], b"")
    return QueuedRequest(request, UnackedDelivery(None, 0, "", 1), 0.0)


def test_a_call_is_shared_by_rows():
    clock = Clock()
    ledger = TimeLedger(before_ns=500, clock=clock)
    clock.ns += 100
    ledger.serve(True)
    clock.ns += 50
    mark = ledger.begin()
    clock.ns += 1_000
    ledger.answered(mark, [a_request(rows=3), a_request("bob\x1fdigits\x1f2", rows=1)])
    parts, open_ns = ledger.parts()
    assert open_ns == 0
    assert parts == {
        Part(STARTING): Spent(600),
        Part(IDLE): Spent(50),
        Part(BUSY, "", "ann", "digits"): Spent(750, 1, 3),
        Part(BUSY, "", "bob", "digits"): Spent(250, 1, 1),
    }


def test_concurrent_calls_share_the_time():
    clock = Clock()
    ledger = TimeLedger(clock=clock)
    first = ledger.begin()
    clock.ns += 100
    second = ledger.begin()
    clock.ns += 100
    ledger.answered(first, [a_request()])
    clock.ns += 30
    parts, open_ns = ledger.parts()
    assert parts[Part(BUSY, "", "ann", "digits")].ns == 150
    assert open_ns == 80
    ledger.waste(second, "lost")
    assert ledger.parts()[0][Part(WASTED, "lost")] == Spent(80, 1)


def test_answers_that_nobody_waited_for_are_waste():
    clock = Clock()
    ledger = TimeLedger(clock=clock)
    mark = ledger.begin()
    clock.ns += 90
    group = [a_request(deadline_ms=5), a_request(id=b"x"), a_request()]
    ledger.answered(mark, group, now_ms=10.0, cancelled={b"x"})
    parts, _ = ledger.parts()
    assert parts[Part(WASTED, "expired")] == parts[Part(WASTED, "cancelled")] == Spent(30, 1, 1)
    assert parts[Part(BUSY, "", "ann", "digits")] == Spent(30, 1, 1)


def test_tenants_are_bounded():
    ledger = TimeLedger(clock=Clock())
    for number in range(MOST_TENANTS + 100):
        ledger.answered(ledger.begin(), [a_request(f"{number}\x1fdigits\x1f1")])
    parts, _ = ledger.parts()
    busy = {part: spent for part, spent in parts.items() if part.kind == BUSY}
    assert len(busy) == MOST_TENANTS + 1
    assert sum(spent.requests for spent in busy.values()) == MOST_TENANTS + 100


@pytest.mark.parametrize("seed", range(8))
def test_the_parts_sum_to_the_time_exactly(seed):
    """Any order of calls, failures, restarts and reports: not one nanosecond is lost or counted twice."""
    draw = random.Random(seed)
    clock = Clock()
    ledger, began = TimeLedger(before_ns=draw.randrange(10**9), clock=clock), clock.ns
    before = ledger.starting
    calls: list[int] = []
    last: dict[Part, Spent] = {}
    requests = 0
    for _ in range(3_000):
        clock.ns += draw.choice((0, 1, 7, draw.randrange(10**7)))
        action = draw.random()
        if action < 0.45 and len(calls) < 9:
            calls.append(ledger.begin())
        elif action < 0.8 and calls:
            group = [
                a_request(
                    f"{draw.randrange(5)}\x1fdigits\x1f1", draw.randrange(4), draw.choice((1, NEVER_MS))
                )
                for _ in range(draw.randrange(1, 33))
            ]
            requests += len(group)
            ledger.answered(calls.pop(draw.randrange(len(calls))), group, now_ms=2.0)
        elif action < 0.85 and calls:
            requests += 1
            ledger.waste(calls.pop(draw.randrange(len(calls))), draw.choice(("lost", "retried")))
        elif action < 0.9:
            ledger.serve(draw.random() < 0.7)
        parts, open_ns = ledger.parts()
        report = ReplicaTime("r", "d", open_ns, parts=parts)
        assert report.total_ns == before + clock.ns - began
        if requests % 50 == 0:
            assert ReplicaTime.from_json(report.to_json()) == report
        for part, spent in last.items():
            assert all(now >= then for now, then in zip(parts[part], spent, strict=True)), "a total shrank"
        last = parts
    assert sum(spent.requests for spent in last.values()) == requests
