"""Booked amounts sum to the replicas' time, with scaling, crashes and outages of the autoscaler."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from services.autoscaler.domain.costs.lives import (
    HOUR_S,
    NS,
    OBSERVED,
    STOPPING,
    UNREPORTED,
    Amount,
    Life,
    LifeBook,
    Place,
)
from services.autoscaler.domain.costs.report import pending_rows, report
from services.autoscaler.domain.launcher import Running
from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from services.worker.domain.time_ledger import TimeLedger
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.protocol.prices import PriceList, TokenPrice, rate_of
from tidegate.kernel.protocol.replica_time import BUSY, IDLE, STARTING, WASTED, Part, ReplicaTime, Spent

from tests.unit.autoscaler.conftest import a_deployment  # isort: skip

pytestmark = pytest.mark.unit

START = 1_700_000_000.0
PRICES = PriceList(core_hour=3.6, gib_hour=0, gpu_hour={})
DEPLOYMENT = a_deployment(name="d")


def running(
    replica: str, at: float, *, ended_at: float | None = None, deployment: str = "d", worker: str = ""
) -> Running:
    return Running(
        replica, deployment, 0, 1, 1, alive=ended_at is None, launched_at=at, ended_at=ended_at, worker=worker
    )


def a_report(replica: str, *, open_ns: int = 0, ended: bool = False, **parts: int) -> ReplicaTime:
    return ReplicaTime(replica, "d", open_ns, ended, {Part(kind): Spent(ns) for kind, ns in parts.items()})


def by_kind(bookings: dict[Place, Amount]) -> dict[str, int]:
    found: dict[str, int] = {}
    for place, amount in bookings.items():
        name = place.part.detail or place.part.kind
        found[name] = found.get(name, 0) + amount.spent.ns
    return found


def note(book: LifeBook, now: float, *rows: Running) -> bool:
    return book.note(rows, {"d": DEPLOYMENT}, {}, PRICES, now)


def test_growth_is_booked_once():
    book = LifeBook()
    note(book, START + 5, running("d-0-1", START))
    times = a_report("d-0-1", starting=3 * NS, idle=2 * NS)
    first, closed = book.book({"d-0-1": times}, PRICES, START + 5)
    again, _ = book.book({"d-0-1": times}, PRICES, START + 5)
    assert (by_kind(first), closed, again) == ({STARTING: 3 * NS, IDLE: 2 * NS, OBSERVED: 5 * NS}, [], {})
    costs = {place.part.kind: amount.cost for place, amount in first.items()}
    assert costs == pytest.approx({STARTING: 0.003, IDLE: 0.002, OBSERVED: 0.0})


@pytest.mark.parametrize(("ended", "rest", "seconds"), [(True, STOPPING, 1.1), (False, UNREPORTED, 1.2)])
def test_the_end_of_a_life(ended, rest, seconds):
    """The time after the last report has a name of its own, and open calls are lost."""
    book = LifeBook()
    note(book, START + 10, running("d-0-1", START))
    assert note(book, START + 10.4), "a replica has ended"
    times = a_report("d-0-1", open_ns=NS, ended=ended, idle=8 * NS)
    found, closed = book.book({"d-0-1": times}, PRICES, START + 11)
    assert closed == ["d-0-1"]
    parts = by_kind(found)
    assert parts.pop(OBSERVED) == pytest.approx(sum(parts.values()), abs=1000)
    assert parts == {IDLE: 8 * NS, "lost": NS, rest: pytest.approx(seconds * NS, abs=1000)}


def test_dead_remains_are_no_life():
    book = LifeBook()
    note(book, START + 1, running("d-0-1", START))
    remains = replace(running("d-0-1", START), alive=False)
    assert note(book, START + 2, remains)
    assert not note(book, START + 3, remains)


@pytest.mark.parametrize(("ended", "rest"), [(True, STOPPING), (False, UNREPORTED)])
def test_a_known_end_is_booked_exactly(ended, rest):
    """The round that sees the end of a process may be late."""
    book = LifeBook()
    note(book, START + 10, running("d-0-1", START))
    assert note(book, START + 14, running("d-0-1", START, ended_at=START + 10.75)), "a replica has ended"
    note(book, START + 15, running("d-0-1", START, ended_at=START + 10.75))
    times = {"d-0-1": a_report("d-0-1", ended=ended, idle=8 * NS)}
    found, closed = book.book(times, PRICES, START + 15)
    assert closed == ["d-0-1"]
    assert by_kind(found) == {IDLE: 8 * NS, rest: int(2.75 * NS), OBSERVED: int(10.75 * NS)}
    assert not note(book, START + 16, running("d-0-1", START, ended_at=START + 10.75)), "only remains"


def test_a_replica_that_ended_before_the_first_round_with_it_is_booked():
    book = LifeBook()
    note(book, START)
    row = running("d-0-1", START + 0.25, ended_at=START + 0.75)
    assert note(book, START + 1, row)
    found, closed = book.book({}, PRICES, START + 1)
    assert closed == ["d-0-1"]
    assert by_kind(found) == {UNREPORTED: NS // 2, OBSERVED: NS // 2}
    assert not note(book, START + 2, row), "its remains are no second life"


def test_the_first_round_of_an_autoscaler_books_no_remains():
    """The former leader has booked them."""
    assert not note(LifeBook(), START + 1, running("d-0-1", START, ended_at=START + 0.75))


def test_a_worker_of_a_warm_pool_waits_until_its_claim():
    book = LifeBook()
    name = "warm-cpu--0-1"
    note(book, START + 60, running(name, START, deployment="warm-cpu-"))
    note(book, START + 61, running("d-0-1", START + 60.25, worker=name))
    found, closed = book.book({}, PRICES, START + 61)
    assert closed == [name]
    assert by_kind(found)[IDLE] == int(60.25 * NS)


def test_an_outage_of_the_autoscaler_is_no_life():
    """A replica that ended while no autoscaler ran is charged to its last report, not to the return."""
    life = Life("d-0-1", "d", "digits", 1, START, START + 10, START + 10, rate_of(DEPLOYMENT, PRICES))
    book = LifeBook([life])
    note(book, START + 5000)
    found, _ = book.book({"d-0-1": a_report("d-0-1", ended=True, idle=100 * NS)}, PRICES, START + 5000)
    assert by_kind(found)[OBSERVED] == pytest.approx(100.1 * NS, abs=1000)


def test_time_over_several_hours_is_booked_in_each():
    book = LifeBook()
    at = START // HOUR_S * HOUR_S + 1800
    note(book, at + 2 * HOUR_S, running("d-0-1", at))
    found, _ = book.book({"d-0-1": a_report("d-0-1", idle=7200 * NS)}, PRICES, at + 2 * HOUR_S)
    idle = {place.hour: amount.spent.ns for place, amount in found.items() if place.part.kind == IDLE}
    assert idle == {
        int(at - 1800): 1800 * NS,
        int(at + 1800): 3600 * NS,
        int(at + 5400): 1800 * NS,
    }


def test_a_waiting_worker_of_a_warm_pool_is_idle():
    book = LifeBook()
    note(book, START + 60, running("warm-cpu--0-1", START, deployment="warm-cpu-"))
    found, _ = book.book({}, PRICES, START + 60)
    assert by_kind(found)[IDLE] == 60 * NS


def test_an_older_report_changes_nothing():
    book = LifeBook()
    note(book, START + 60, running("d-0-1", START))
    book.book({"d-0-1": a_report("d-0-1", idle=50 * NS)}, PRICES, START + 60)
    found, _ = book.book({"d-0-1": a_report("d-0-1", idle=40 * NS)}, PRICES, START + 60)
    assert by_kind(found) == {}


def test_a_booking_that_was_not_stored_is_booked_later():
    book = LifeBook()
    note(book, START + 10, running("d-0-1", START))
    times = {"d-0-1": a_report("d-0-1", idle=9 * NS)}
    before = book.copy()
    first, _ = book.book(times, PRICES, START + 10)
    book.restore(before)
    assert book.book(times, PRICES, START + 10)[0] == first


def test_the_tokens_of_a_provider_cost():
    prices = PRICES.model_copy(update={"tokens": {"digits": TokenPrice(input=1.0, output=2.0, cached=0.5)}})
    book = LifeBook()
    note(book, START + 1, running("d-0-1", START))
    part = Part(BUSY, "", "ann", "digits")
    times = ReplicaTime("d-0-1", "d", parts={part: Spent(NS, 1, 1, 3_000_000, 1_000_000, 1_000_000)})
    found, _ = book.book({"d-0-1": times}, prices, START + 1)
    (amount,) = (amount for place, amount in found.items() if place.part == part)
    assert amount.token_cost == pytest.approx(2.0 + 0.5 + 2.0)


def test_a_report_by_endpoint_sums_to_the_total():
    book = LifeBook()
    note(book, START + 100, running("d-0-1", START))
    parts = {
        Part(BUSY, "", "ann", "a"): Spent(30 * NS, 300, 300),
        Part(BUSY, "", "bob", "b"): Spent(10 * NS, 100, 100),
        Part(IDLE): Spent(40 * NS),
        Part(WASTED, "expired"): Spent(10 * NS, 3, 3),
    }
    bookings, _ = book.book({"d-0-1": ReplicaTime("d-0-1", "d", parts=parts)}, PRICES, START + 100)
    rows = [*bookings.items(), *pending_rows(book.lives.values())]
    for by in ("deployment", "version", "endpoint", "key"):
        found = report(rows, by, PRICES)
        assert found["replica_seconds"] == pytest.approx(100) == found["observed_seconds"]
        assert sum(item["cost"] for item in found["items"]) == pytest.approx(found["total"]["cost"]), by
    items = {item["key"]: item for item in report(rows, "key", PRICES)["items"]}
    assert items["ann"]["direct"] == pytest.approx(0.03)
    assert items["ann"]["overhead"] == pytest.approx(0.06 * 3 / 4)
    assert items["ann"]["per_1000_requests"] == pytest.approx(0.075 / 300 * 1000)


@dataclass
class Replica:
    """A simulated replica with the worker's real ledger, on a simulated clock."""

    name: str
    born: float
    clock: list[int]
    ledger: TimeLedger = field(init=False)
    calls: list[int] = field(default_factory=list)
    died: float | None = None

    def __post_init__(self) -> None:
        self.ledger = TimeLedger(clock=lambda: self.clock[0])

    def report(self, *, ended: bool = False) -> ReplicaTime:
        parts, open_ns = self.ledger.parts()
        return ReplicaTime(self.name, "d", open_ns, ended, parts)


class Fleet:
    """Replicas that start, work, drain and crash at random."""

    def __init__(self, seed: int, step: float) -> None:
        self.draw = random.Random(seed)
        self.step = step
        self.clock = [0]
        self.alive: dict[str, Replica] = {}
        self.everyone: list[Replica] = []
        self.times: dict[str, ReplicaTime] = {}

    def advance(self, tick: int, now: float, *, may_start: bool) -> None:
        self.clock[0] = int(tick * self.step * NS)
        if may_start and self.draw.random() < self.step / 60 and len(self.alive) < 6:
            replica = Replica(f"d-0-{len(self.everyone)}", now, self.clock)
            self.alive[replica.name] = replica
            self.everyone.append(replica)
        for replica in list(self.alive.values()):
            self._work(replica, now)
            if tick % 10 == 0:
                self.times[replica.name] = replica.report()
            if self.draw.random() < self.step / 240:
                if self.draw.random() < 0.5:  # it drains; the others crash
                    self.times[replica.name] = replica.report(ended=True)
                replica.died = now
                del self.alive[replica.name]

    def _work(self, replica: Replica, now: float) -> None:
        if now - replica.born > 4:
            replica.ledger.serve(True)
        if self.draw.random() < 0.1 and len(replica.calls) < 4:
            replica.calls.append(replica.ledger.begin())
        elif replica.calls and self.draw.random() < 0.2:
            request = Request(b"", 2**62, 1, 0, 0, b"ann\x1fd\x1f1", b"", b"", [], b"")
            group = [QueuedRequest(request, UnackedDelivery(None, 0, "", 1), 0.0)]
            replica.ledger.answered(replica.calls.pop(), group)


@pytest.mark.parametrize("seed", range(3))
def test_hours_of_scaling_and_crashes_sum_to_the_replicas_time(seed):
    """In two hours with outages of the autoscaler, booked time is the replicas' true time within 0.1 %."""
    step, now = 0.1, START
    fleet, book, rows = Fleet(seed, step), LifeBook(), dict[Place, Amount]()
    away_until = 0.0
    for tick in range(int(2 * HOUR_S / step)):
        now = START + tick * step
        fleet.advance(tick, now, may_start=now >= away_until)
        if fleet.draw.random() < step / 900 and now < START + 2 * HOUR_S - 300:
            away_until = now + fleet.draw.uniform(5, 120)
        if now >= away_until and tick % 5 == 0:
            note(book, now, *(running(each.name, each.born) for each in fleet.alive.values()))
        if now >= away_until and tick % 100 == 0:
            found, closed = book.book(fleet.times, PRICES, now)
            for place, amount in found.items():
                rows[place] = rows[place].plus(amount) if place in rows else amount
            for name in closed:
                del fleet.times[name]
    true_s = sum((each.died or now) - each.born for each in fleet.everyone)
    summed = report([*rows.items(), *pending_rows(book.lives.values())], "key", PRICES)
    assert len(fleet.everyone) > 40
    assert summed["replica_seconds"] == pytest.approx(true_s, rel=1e-3)
    assert summed["replica_seconds"] == pytest.approx(summed["observed_seconds"], rel=1e-3)
    assert summed["total"]["cost"] == pytest.approx(summed["replica_seconds"] / 1000)
