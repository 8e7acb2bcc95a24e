"""Test each policy in simulated time: schedule, budget, windows, limits, panic, presets, signals."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from services.autoscaler.domain.load import growth
from services.autoscaler.domain.memory import Load, Sample
from services.autoscaler.domain.rules import ReplicaCounts, predicted_wait_ms, rule_needs
from services.autoscaler.domain.snapshot import Policy
from services.autoscaler.domain.tuning import tuning

NAME = "digits-v1"
OFFICE = {
    "start": "0 8 * * mon-fri",
    "end": "0 18 * * mon-fri",
    "time_zone": "Europe/Berlin",
    "min_replicas": 3,
    "max_replicas": 5,
}


def a_load(demand: int = 0, **given) -> Load:
    return Load(
        **{"new": 0, "arrival_rate": 0.0, "ms_per_request": 20.0, "batch": 1.0, **given}, demand=demand
    )


def asks(deployment, load: Load, fleet: ReplicaCounts = ReplicaCounts(1)) -> dict[str, int]:
    found = rule_needs(load, load.demand or 0, tuning(deployment, Policy()), fleet)
    return {term.rule: term.replicas for term in found}


def test_a_schedule_lifts_the_bounds_ahead_of_its_time_and_lets_go_after(make_world, deployment):
    world = make_world(deployment(max_replicas=2, scaling={"schedule": [OFFICE]}), start_s=20.0)
    world.now = datetime(2026, 7, 3, 7, 0, tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
    world.run(60, step=1.0)
    assert world.target() == 1
    world.now = datetime(2026, 7, 3, 7, 59, tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
    world.run(50, step=1.0)
    assert world.target() == 3, "a start takes 20 s here, so they begin before eight"
    assert world.decisions[-1].rule == "schedule"
    world.run(11, step=1.0)
    assert world.statuses[NAME].ready == 3, "they are ready when the window opens"
    assert world.statuses[NAME].limits == (3, 5)
    world.outstanding[NAME] = 1000
    world.call_ms = 20.0
    world.run(5, step=1.0)
    assert world.target() == 5
    world.outstanding[NAME] = 0
    world.now = datetime(2026, 7, 3, 18, 0, tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
    world.run(40, step=1.0)
    assert world.target() == 1


def test_a_window_that_allows_less_than_the_minimum_means_it(make_world, deployment):
    night = {"start": "0 22 * * *", "end": "0 6 * * *", "max_replicas": 1}
    world = make_world(deployment(min_replicas=3, max_replicas=5, scaling={"schedule": [night]}))
    world.now = datetime(2026, 7, 3, 23, 0, tzinfo=ZoneInfo("UTC")).timestamp()
    world.run(5)
    assert world.target() == 1


def test_the_budget_goes_before_the_minimum_and_is_told(make_world, deployment):
    paid = {"price_per_hour": 1.5, "max_cost_per_hour": 3.2}
    world = make_world(deployment(min_replicas=4, max_replicas=8, scaling=paid))
    world.run(5)
    assert world.target() == 2
    assert world.decisions[0].rule == "cost cap"
    assert "a budget of 3.2 an hour pays for 2 replicas at 1.5 each" in world.decisions[0].reason
    assert world.statuses[NAME].cost_per_hour == 3.0


def test_backlog_per_replica_needs_no_service_rate(make_world, deployment):
    world = make_world(deployment(max_replicas=9, scaling={"backlog_per_replica": 5}))
    world.run(5)
    world.outstanding[NAME] = 31
    world.round()
    assert world.target() == 7
    assert world.decisions[-1].rule == "backlog"
    assert "31 requests and jobs; a replica may have 5" in world.decisions[-1].reason


def test_the_largest_of_the_rules_counts(deployment):
    both = deployment(scaling={"backlog_per_replica": 2, "target_utilization": 0.5})
    assert asks(both, a_load(22, arrival_rate=100.0, utilization=0.9), ReplicaCounts(4)) == {
        "wait": 2,
        "backlog": 11,
        "utilization": 4,
        "busy": 8,
    }
    assert asks(both, a_load(22, arrival_rate=100.0, utilization=0.52), ReplicaCounts(4))["busy"] == 4, (
        "near enough"
    )
    assert "busy" not in asks(both, a_load(22, utilization=0.9), ReplicaCounts(2, starting=1)), (
        "two do three's work"
    )
    gpus = a_load(22, utilization=0.2, gpu_utilization=0.9)
    assert asks(both, gpus, ReplicaCounts(4))["busy"] == 8, "the busier of worker and GPU"


def test_instances_share_the_work_of_a_replica(deployment):
    """100 outstanding at 20 ms need 10 replicas with one instance (the module's formula), 5 with two."""
    assert asks(deployment(), a_load(100))["wait"] == 10
    assert asks(deployment(), a_load(100, slots=2))["wait"] == 5
    assert asks(deployment(), a_load(0, arrival_rate=160.0, slots=2))["utilization"] == 2


def test_the_knob(deployment):
    """Three presets need different numbers for the same load, and follow it at different speeds."""
    load = a_load(60, arrival_rate=100.0)
    wanted = {
        temper: max(asks(deployment(scaling={"aggressiveness": temper}), load).values())
        for temper in ("economy", "balanced", "latency")
    }
    assert wanted == {"economy": 3, "balanced": 6, "latency": 10}
    windows = [
        tuning(deployment(scaling={"aggressiveness": temper}), Policy())
        for temper in ("economy", "balanced", "latency")
    ]
    assert [found.down_window_s for found in windows] == [15.0, 30.0, 120.0]
    assert [found.idle_s for found in windows] == [30.0, 60.0, 300.0]
    exception = deployment(scaling={"aggressiveness": "latency", "down_window_s": 7, "panic_factor": 0})
    assert tuning(exception, Policy()).down_window_s == 7.0
    assert tuning(exception, Policy()).panic_factor == 0.0


def test_the_up_window_waits_for_a_load_that_lasts(make_world, deployment):
    world = make_world(deployment(max_replicas=8, scaling={"up_window_s": 10, "panic_factor": 0}))
    world.call_ms = 20.0
    world.run(5)
    world.outstanding[NAME] = 40
    world.run(3)
    world.outstanding[NAME] = 0
    world.run(20)
    assert world.target() == 1, "three seconds are too short for a rate"
    world.outstanding[NAME] = 40
    world.run(9.5)
    assert world.target() == 1
    world.run(1)
    assert world.target() == 4


def test_a_sleeper_wakes_at_once_whatever_the_window(make_world, deployment):
    slow = {"aggressiveness": "economy", "up_window_s": 60, "max_up_per_minute": 1}
    world = make_world(deployment(min_replicas=0, max_replicas=3, scaling=slow))
    world.run(60)
    assert world.target() == 0
    world.outstanding[NAME] = 1
    world.round()
    assert world.target() == 1


def test_limits_on_how_many_come_and_go_in_a_minute(make_world, deployment):
    limits = {"max_up_per_minute": 2, "max_down_per_minute": 1, "panic_factor": 0}
    world = make_world(deployment(max_replicas=8, scaling=limits))
    world.call_ms = 20.0
    world.run(5)
    world.outstanding[NAME] = 80
    world.round()
    assert world.target() == 3
    assert world.decisions[-1].rule == "limited"
    world.run(59)
    assert world.target() == 3
    world.run(3)
    assert world.target() == 5
    world.run(121)
    assert world.target() == 8
    world.outstanding[NAME] = 0
    targets = []
    for _ in range(8):
        world.run(60)
        targets.append(world.target())
    assert targets == [7, 6, 5, 4, 3, 2, 1, 1]


def test_panic_breaks_windows_and_limits_and_takes_nothing_away(make_world, deployment):
    careful = {"up_window_s": 60, "max_up_per_minute": 1, "down_window_s": 20}
    world = make_world(deployment(max_replicas=9, scaling=careful))
    world.call_ms = 20.0
    world.run(5)
    world.outstanding[NAME] = 80
    world.round()
    assert world.target() == 8
    world.run(5)
    world.outstanding[NAME] = 50
    world.run(10)
    assert world.target() == 8
    assert world.statuses[NAME].rule == "panic"
    world.run(60)
    assert world.target() == 5


def test_a_burst_counts_before_the_average_has_seen_it(make_world, deployment):
    world = make_world(deployment(max_replicas=9))
    world.call_ms = 20.0
    for _ in range(30):
        world.arrived[NAME] = world.arrived.get(NAME, 0) + 5
        world.run(0.5)
    assert world.target() == 1
    for _ in range(4):
        world.arrived[NAME] += 100
        world.run(0.5)
    assert world.target() >= 4
    assert world.decisions[-1].rule == "panic"


def test_of_unknown_demand_the_known_part_may_scale_up(make_world, deployment):
    world = make_world(deployment(max_replicas=8))
    world.call_ms = 20.0
    world.run(5)
    world.gateway_known = False
    world.outstanding[NAME] = 40
    world.round()
    assert world.target() == 4
    assert world.decisions[-1].rule == "demand unknown"
    assert "the known demand: 40 requests and jobs" in world.decisions[-1].reason
    world.outstanding[NAME] = 0
    world.run(300)
    assert world.target() == 4


def test_a_steady_climb_is_followed_ahead_and_a_step_is_not():
    def trail(rates: list[float]) -> tuple[Sample, ...]:
        samples, total = [Sample(0.0, 0.0)], 0.0
        for number, rate in enumerate(rates, start=1):
            total += 5 * rate
            samples.append(Sample(5.0 * number, total))
        return tuple(samples)

    climb = [50.0 + 5 * number for number in range(12)]
    assert growth(trail(climb)) == pytest.approx(1.0)
    assert growth(trail([50.0] * 12)) == 0.0
    assert growth(trail([50.0] * 6 + [120.0] * 6)) == 0.0, "a step"
    assert growth(trail(climb[::-1])) == 0.0
    noisy = [50.0, 53.0, 47.0, 51.0, 49.5, 52.0, 48.0, 50.0, 53.0, 50.5, 49.0, 52.0]
    assert growth(trail(noisy)) == 0.0
    assert growth(trail([2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6])) == 0.0, "so few arrivals may be random"


def test_a_trend_counts_for_as_long_as_a_start_takes(deployment):
    rising = a_load(0, arrival_rate=100.0, trend=2.0)
    assert asks(deployment(), rising, ReplicaCounts(3, start_s=30.0))["trend"] == 4
    assert asks(deployment(), rising, ReplicaCounts(3, start_s=3000.0))["trend"] == 5, (
        "at most twice the rate"
    )
    economy = deployment(scaling={"aggressiveness": "economy"})
    assert "trend" not in asks(economy, rising, ReplicaCounts(3, start_s=30.0))


def test_the_time_of_a_start_is_measured(make_world, deployment):
    world = make_world(deployment(max_replicas=4), start_s=7.0)
    world.run(10)
    assert world.statuses[NAME].start_s == pytest.approx(7.0, abs=0.51)
    assert world.decisions[0].inputs["start_s"] == 0.0


def test_a_start_that_is_over_before_the_next_look_is_timed_all_the_same(make_world, deployment):
    world = make_world(deployment(), start_s=0.0)
    world.run(2)
    assert world.statuses[NAME].ready == 1
    assert world.statuses[NAME].start_s == pytest.approx(0.5, abs=0.01)


def test_the_predicted_wait():
    assert predicted_wait_ms(a_load(30), ReplicaCounts(ready=2)) == 14 * 20
    assert predicted_wait_ms(a_load(1), ReplicaCounts(ready=2)) == 0.0
    assert predicted_wait_ms(a_load(1), ReplicaCounts(start_s=3.0)) == 3000.0
    assert predicted_wait_ms(a_load(1), ReplicaCounts()) is None
    assert predicted_wait_ms(replace(a_load(), demand=None), ReplicaCounts(2)) is None


def test_heartbeats_without_progress_are_stuck(make_world, deployment):
    world = make_world(deployment(min_replicas=2, max_replicas=2, progress_timeout_s=60))
    world.run(10)
    world.workers["digits-v1-0-1"].inflight = 3
    world.run(64)
    assert world.killed == []
    world.run(3)
    assert world.killed[0][1:] == ("digits-v1-0-1", "stuck")
    assert "finished none of its 3 requests in 60 s" in world.statuses[NAME].ended[0]["message"]


def test_progress_however_slow_is_progress_and_long_jobs_are_let_be(make_world, deployment):
    world = make_world(deployment(min_replicas=2, max_replicas=2))
    world.run(10)
    slow, job = world.workers["digits-v1-0-1"], world.workers["digits-v1-1-1"]
    slow.inflight = job.inflight = job.jobs = 1
    for _ in range(10):
        world.run(100, step=5.0)
        slow.completed += 1
    assert world.killed == []
    job.jobs = 0
    world.run(320, step=5.0)
    assert {found[1] for found in world.killed} == {"digits-v1-0-1", "digits-v1-1-1"}


def test_out_of_memory_is_told_as_such(make_world, deployment):
    world = make_world(deployment())
    world.run(5)
    worker = world.workers["digits-v1-0-1"]
    worker.running = replace(
        worker.running, alive=False, out_of_memory=True, ending="the container was killed: out of memory"
    )
    worker.silent = True
    world.round()
    assert world.killed[0][1:] == ("digits-v1-0-1", "out of memory")
    assert world.statuses[NAME].ended[0]["cause"] == "out of memory"


def test_nothing_starts_on_a_cordoned_host(make_world, deployment):
    world = make_world(deployment(max_replicas=4))
    world.call_ms = 20.0
    world.run(5)
    world.cordoned = {"here"}
    world.outstanding[NAME] = 40
    world.run(20)
    assert len(world.names()) == 1
    assert world.target() == 4
    assert world.condition("Placeable").reason == "Cordoned"
    world.cordoned = set()
    world.run(5)
    assert len(world.names()) == 4
    assert world.condition("Placeable") is None
