"""The history of endpoints: totals become spans, spans become minutes, and a restart loses no minute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from services.gateway.domain.traffic_counts import MOST_REASONS, OTHER, TrafficCounter
from services.router.adapters.watch_file import WatchFile
from services.router.application.endpoint_watch import EndpointWatch
from services.router.domain.watch.history import KEPT, History, Stored
from services.router.domain.watch.readings import REMEMBERED_S, Reading, Readings
from services.router.domain.watch.shown import live, point
from services.router.domain.watch.window import ReplicaWork, Window, merged
from tidegate.kernel.protocol.latency_buckets import RATIO
from tidegate.kernel.protocol.models import Endpoint, Target
from tidegate.kernel.protocol.presence import ModelDeath, ReplicaReport
from tidegate.kernel.protocol.traffic import TrafficReport
from tidegate.kernel.protocol.traffic_histograms import dense, sparse

pytestmark = pytest.mark.unit

ENDPOINT = Endpoint(name="m", targets=[Target(deployment="m-v1")], revision=1)
T0 = 1_000_000_000.0


def rows(count: int, seconds: float = 0.02) -> np.ndarray:
    """Return requests whose time is in the model for one half and in transit for the other."""
    one = [seconds, 0.0, seconds / 2, 0.0, seconds / 2, 0.0]
    return np.array([one] * count)


def reading(at: float, counter: TrafficCounter, incarnation: str = "a", **more) -> Reading:
    report = TrafficReport.from_json(TrafficReport(incarnation, at, counter.report()).to_json())
    return Reading(at, [report], endpoints=[ENDPOINT], **more)


def test_totals_of_gateways_become_spans():
    counter, readings = TrafficCounter(), Readings()
    counter.add("m", "m-v1", rows(5))
    assert readings.spans(reading(T0, counter)) == {}  # it is not known when these were
    counter.add("m", "m-v1", rows(100))
    counter.add_outcome("m", "overloaded", failed=True)
    counter.add_outcome("m", "bad_request")
    window = readings.spans(reading(T0 + 5, counter))["m"]
    assert (window.answered, window.failed, window.requests) == (100, 1, 101)
    assert window.outcomes == {"ok": 100, "overloaded": 1, "bad_request": 1}
    assert window.answered_by == {"m-v1": 100}
    assert window.quantile_s(0.99) == pytest.approx(0.02, rel=RATIO - 1)
    assert window.ledger_ms()["compute"] == pytest.approx(10, rel=0.06)
    again = readings.spans(reading(T0 + 10, counter))["m"]
    assert (again.requests, again.outcomes) == (0, {})


def test_a_gateway_that_starts_later_counts_from_its_start():
    readings, first, second = Readings(), TrafficCounter(), TrafficCounter()
    readings.spans(reading(T0, first))
    second.add("m", "m-v1", rows(7))
    assert readings.spans(reading(T0 + 5, second, "b"))["m"].answered == 7


def test_an_endpoint_that_is_created_again_counts_from_zero():
    readings, counter = Readings(), TrafficCounter()
    readings.spans(reading(T0, counter))
    counter.add("m", "m-v1", rows(50))
    counter.add_outcome("m", "overloaded", failed=True)
    readings.spans(reading(T0 + 5, counter))
    counter = TrafficCounter()
    counter.add("m", "m-v1", rows(3))
    found = readings.spans(reading(T0 + 10, counter))["m"]
    assert (found.answered, found.failed, found.timed()) == (3, 0, 3)


def test_totals_that_expired_in_the_store_do_not_count_again():
    counter, readings = TrafficCounter(), Readings()
    readings.spans(reading(T0, counter))
    counter.add("m", "m-v1", rows(50))
    assert readings.spans(reading(T0 + 5, counter))["m"].answered == 50
    assert readings.spans(Reading(T0 + 10, endpoints=[ENDPOINT]))["m"].answered == 0
    counter.add("m", "m-v1", rows(3))
    found = readings.spans(reading(T0 + 15, counter))["m"]
    assert (found.answered, found.timed()) == (3, 3)
    assert readings.spans(reading(T0 + 20, TrafficCounter(), "b"))["m"].answered == 0
    readings.spans(reading(T0 + 16 + REMEMBERED_S, TrafficCounter(), "b"))
    assert {incarnation for incarnation, _ in readings._traffic} <= {"b"}


def test_replicas_add_their_time_their_work_and_their_deaths():
    readings, counter = Readings(), TrafficCounter()
    status = {"ready": 2, "starting": 1, "utilization": 0.5, "demand": 3, "predicted_wait_ms": 250.0}

    def replica(done: int, deaths: int) -> ReplicaReport:
        death = ModelDeath(at=T0, words="", total=deaths) if deaths else None
        return ReplicaReport(
            "r", "m-v1", 1, "h", 1, "ready", completed=done, busy_ms=done * 4.0, call_ms=8.0, batch_mean=2.0,
            death=death, inflight=1,
        )  # fmt: skip

    ended = {"ended": [{"at": T0 - 9}]}
    readings.spans(
        reading(T0, counter, statuses={"m-v1": status | ended}, replicas=[replica(10, 0)], callers={"m": 3})
    )
    ended = {"ended": [{"at": T0 + 1}, {"at": T0 - 9}]}
    more: dict[str, Any] = {"statuses": {"m-v1": status | ended}, "callers": {"m": 4}, "dead": {"m-v1": 2}}
    window = readings.spans(reading(T0 + 10, counter, replicas=[replica(30, 1)], **more))["m"]
    assert (window.replica_s, window.used_s, window.utilization) == (30.0, 15.0, 0.5)
    assert (window.restarts, window.dead, window.callers) == (2, 2, 4)
    assert (window.queue, window.queue_age_s, window.cold_s) == (3, 0.25, 0.0)
    assert window.replicas["r"] == ReplicaWork(20, 0.08, 160.0, 40.0, 0.0)
    stuck = readings.spans(reading(T0 + 20, counter, replicas=[replica(30, 1)], **more))["m"]
    assert stuck.replicas["r"].stuck_s == 10.0


def test_waiting_for_a_cold_start_grows_old():
    readings, counter = Readings(), TrafficCounter()
    cold = {"m-v1": {"ready": 0, "starting": 1, "demand": 2}}
    for seconds in (0, 10, 20):
        found = readings.spans(reading(T0 + seconds, counter, statuses=cold))
    assert (found["m"].queue_age_s, found["m"].cold_s) == (20.0, 10.0)


def test_names_of_outcomes_are_bounded():
    counter = TrafficCounter()
    for number in range(500):
        counter.add_outcome("m", f"made-up-{number}")
    outcomes = counter.report()["m"].outcomes
    assert len(outcomes) == MOST_REASONS + 1
    assert outcomes[OTHER] == 500 - MOST_REASONS
    counter.keep(["other"], [])
    assert counter.report() == {}


def test_short_lists_have_the_same_counts():
    generator = np.random.default_rng(1)
    histograms = generator.integers(0, 3, (6, 160))
    histograms[2] = 0
    assert (dense(sparse(histograms)) == histograms).all()
    assert not dense([[500, 1], [-3, 1], [159, 1, 2, 3]])[:2].any()


def window(at: float, answers: int = 10, failed: int = 0, **more) -> Window:
    found = Window(at, at + 5, outcomes={"ok": answers}, failed=failed, **more)
    found.times[0, 50] = answers
    return found


def test_ticks_become_minutes_and_hours():
    history = History()
    stored = []
    for tick in range(2 * 720 + 1):
        stored += history.add({"m": window(T0 // 3600 * 3600 + tick * 5)})
    minutes = [each for each in stored if each.level == "minute"]
    hours = [each for each in stored if each.level == "hour"]
    assert (len(minutes), len(hours)) == (120, 2)
    assert {Window.from_json(each.body).answered for each in minutes} == {120}
    assert {Window.from_json(each.body).answered for each in hours} == {7200}
    end = T0 // 3600 * 3600 + 2 * 3600
    assert history.of("m").between(end - 7200, end).answered == 14_400
    assert history.of("m").recent(300, end).answered == 600
    restored = History()
    restored.restore(stored)
    assert restored.of("m").between(end - 7200, end).answered == 14_400
    assert [each.answered for each in restored.of("m").hours(0)] == [7200, 7200]


def test_a_restart_in_the_middle_of_an_hour_keeps_its_minutes_in_it():
    begin = T0 // 3600 * 3600
    history, stored = History(), []
    for tick in range(720 + 361):  # an hour and a half
        stored += history.add({"m": window(begin + tick * 5)})
    again = History()
    assert again.restore([each for each in stored if each.level == "minute"]) != [], "the first hour is over"
    closed: list[Stored] = []
    for tick in range(1081, 2 * 720 + 1):
        closed += again.add({"m": window(begin + tick * 5)})
    assert [each.answered for each in again.of("m").hours(0)] == [7200, 7190]
    (hour,) = [each for each in closed if each.level == "hour"]
    assert (hour.start, Window.from_json(hour.body).answered) == (begin + 3600, 7190)


def test_the_history_is_bounded():
    history = History()
    for minute in range(KEPT["minute"] + 50):
        history.add({"m": Window(minute * 60.0, minute * 60.0 + 60, outcomes={"ok": 1})})
    assert len(history.of("m").levels["minute"].briefs) == KEPT["minute"]
    assert len(history.of("m").ticks) <= 31
    history.keep({"other"})
    assert history.endpoints == {}


def test_idle_minutes_are_not_kept():
    history = History()
    for tick in range(100):
        assert history.add({"m": Window(tick * 5.0, tick * 5.0 + 5)}) == []


def test_shown_numbers():
    history = History()
    for tick in range(6):
        history.add({"m": window(T0 + tick * 5, failed=10, callers=4)})
    statuses = [{"ready": 1, "desired": 2, "reason": "busy", "queue": 7}]
    line = live(ENDPOINT, history.of("m"), statuses, T0 + 30)
    assert (line["rate"], line["error_rate"], line["queue"], line["callers_today"]) == (4.0, 0.5, 7, 4)
    assert (line["ready"], line["desired"], line["why"], line["cost_per_hour"]) == (1, 2, "busy", None)
    assert point(merged([], 0, 1))["p95_ms"] is None


async def test_a_suspended_router_changes_nothing_after_its_lease(tmp_path):
    """It wakes up in the middle of a reading, when another router leads."""
    leads = [True]

    class Suspends(SimpleNamespace):
        async def traffic(self) -> list[TrafficReport]:
            return []

        async def gateways(self) -> SimpleNamespace:
            return SimpleNamespace(reports=[])

        async def replicas(self) -> list[ReplicaReport]:
            leads[0] = False
            return []

        async def statuses(self) -> dict[str, Any]:
            return {}

        async def count_callers(self, *_: Any) -> dict[str, int]:
            return {}

    registry: Any = SimpleNamespace(desired=SimpleNamespace(endpoints=[ENDPOINT]))
    file = WatchFile(tmp_path / "watch.db")
    store: Any = Suspends()
    watch = EndpointWatch(store, registry, lambda: leads[0], file, list, every_s=1.0, day_s=86_400)
    calls: list[float] = []

    async def evaluate(now: float) -> None:
        calls.append(now)

    watch.after.append(evaluate)
    await watch._step()
    assert calls == []
    leads[0] = True
    registry.desired = None
    await watch._step()
    assert calls == [], "without the registry, all endpoints would count as removed"
    file.close()
