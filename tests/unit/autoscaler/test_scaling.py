"""Test the number of replicas over minutes of simulated time."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.autoscaler.domain.load import with_guess
from services.autoscaler.domain.memory import Load
from services.autoscaler.domain.rules import ReplicaCounts, largest, rule_needs
from services.autoscaler.domain.snapshot import LocalOverride, Policy
from services.autoscaler.domain.tuning import tuning
from tests.unit.autoscaler.conftest import a_deployment
from tidegate.kernel.protocol.models import Endpoint, Override, Rollout, RolloutPhase, Target

NAME = "digits-v1"


def recommend(load: Load, **given) -> int:
    """Return the need of the rules, with the default policy and the ``given`` fields."""
    found = largest(
        rule_needs(load, load.demand or 0, tuning(a_deployment(**given), Policy()), ReplicaCounts())
    )
    return found.replicas if found else 0


def test_holds_the_minimum(make_world, deployment):
    world = make_world(deployment(min_replicas=2, max_replicas=4))
    world.run(10)
    assert world.names() == ["digits-v1-0-1", "digits-v1-1-1"]
    assert len(world.launched) == 2
    assert world.statuses[NAME].ready == 2
    assert world.condition("Ready").ok
    assert world.condition("Loaded").ok


def test_a_single_slow_request_asks_for_one_replica():
    slow = Load(demand=1, new=1, arrival_rate=0.5, ms_per_request=1000.0, batch=1.0)
    assert recommend(slow) == 1


@pytest.mark.parametrize(
    ("demand", "rate", "expected"),
    [(0, 0.0, 0), (10, 0.0, 1), (100, 0.0, 10), (0, 100.0, 3), (0, 160.0, 4), (100, 160.0, 10)],
)
def test_queue_and_rate_terms(demand, rate, expected):
    """At 20 ms a request and a wait of 200 ms, a replica serves 11 outstanding or 40 arrivals a second."""
    load = Load(demand=demand, new=0, arrival_rate=rate, ms_per_request=20.0, batch=1.0)
    assert recommend(load) == expected


def a_rollout(phase: RolloutPhase) -> Endpoint:
    rollout = Rollout(deployment="digits-v2", base=[Target(deployment=NAME)], id="r", phase=phase)
    targets = [Target(deployment=NAME), Target(deployment="digits-v2")]
    return Endpoint(name="digits", targets=targets, rollout=rollout, revision=1)


def test_the_baseline_of_a_canary_keeps_its_replicas(make_world, deployment):
    world = make_world(deployment(max_replicas=8))
    world.endpoints = [a_rollout("running")]
    world.call_ms = 20.0
    world.run(5)
    world.outstanding[NAME] = 40
    world.run(30)
    high = world.statuses[NAME].desired
    assert high > 1
    world.outstanding[NAME] = 0
    world.run(600)
    assert world.statuses[NAME].desired == high
    world.endpoints = [a_rollout("promoted")]
    world.run(600)
    assert world.statuses[NAME].desired < high


def test_a_canary_without_requests_stays_awake(make_world, deployment):
    """It gets no requests before it is ready, so no request would wake it."""
    world = make_world(deployment(name="digits-v2", min_replicas=0, scale_to_zero_after_s=30))
    world.endpoints = [a_rollout("running")]
    world.run(300)
    assert len(world.names("digits-v2")) == 1
    world.endpoints = [a_rollout("rolled_back")]
    world.run(300)
    assert not world.names("digits-v2")


def test_up_at_once_and_down_after_the_window(make_world, deployment):
    world = make_world(deployment(max_replicas=8))
    world.call_ms = 20.0
    world.run(5)
    world.outstanding[NAME] = 40
    world.round()
    assert world.target() == 4
    world.run(5)
    world.outstanding[NAME] = 1
    world.run(29.5)
    assert world.target() == 4, "the window still prevents scaling down"
    world.run(3)
    assert world.target() == 1
    assert world.names() == ["digits-v1-0-1"]


def test_jobs_are_demand_too(make_world, deployment):
    """Waiting and running jobs count, beside the requests outstanding at the gateways."""
    world = make_world(deployment(max_replicas=8))
    world.call_ms = 20.0
    world.run(5)
    world.outstanding[NAME] = 10
    world.jobs = {NAME: 30, "another-v1": 500}
    world.round()
    assert world.statuses[NAME].demand == 40
    assert world.target() == 4


def test_a_job_wakes_what_sleeps_and_keeps_it_awake(make_world, deployment):
    world = make_world(deployment(min_replicas=0, scale_to_zero_after_s=10.0))
    world.run(60)
    assert world.names() == []
    world.jobs = {NAME: 1}
    world.run(120)
    assert len(world.names()) == 1
    world.jobs = {}
    world.run(60)
    assert world.names() == []


def test_jobs_that_cannot_be_counted_are_not_none(make_world, deployment):
    world = make_world(deployment(min_replicas=0, max_replicas=8, scale_to_zero_after_s=10.0))
    world.call_ms = 20.0
    world.jobs = {NAME: 40}
    world.run(5)
    assert world.target() == 4
    world.jobs = None
    world.run(120)
    assert world.statuses[NAME].demand is None
    assert world.target() == 4, "nothing is scaled down on a guess"
    assert not world.condition("DemandKnown").ok
    world.jobs = {}
    world.run(60)
    assert world.target() == 0


def test_a_short_dip_does_not_scale_down(make_world, deployment):
    world = make_world(deployment(max_replicas=8))
    world.call_ms = 20.0
    for _ in range(8):
        world.outstanding[NAME] = 40
        world.run(5)
        world.outstanding[NAME] = 0
        world.run(20)
        assert world.target() == 4
    assert len(world.launched) == 4


def test_an_unknown_rate_goes_up_one_step_at_a_time(make_world, deployment):
    world = make_world(deployment(max_replicas=5))
    world.run(5)
    world.outstanding[NAME] = 50
    world.round()
    assert world.target() == 2
    world.run(2)
    assert world.target() == 2, "the next step waits until this one has become ready"
    world.run(60)
    assert world.target() == 5


def test_a_measured_capacity_is_the_first_guess(make_world, deployment):
    """50 requests/s of a replica are 20 ms each, so 40 outstanding need 4 replicas immediately."""
    world = make_world(deployment(max_replicas=8))
    world.metrics = {"accuracy": 0.9, "capacity_rps": 50.0}
    world.run(5)
    world.outstanding[NAME] = 40
    world.round()
    assert world.target() == 4
    decision = world.decisions[-1]
    assert "40 requests and jobs at 20 ms each (estimated from " in decision.reason
    assert "50 requests/s" in decision.reason
    assert decision.inputs["guessed"]
    assert world.statuses[NAME].service_rate is None, "nothing was measured of its replicas"

    world.call_ms = 5.0
    world.outstanding[NAME] = 80
    world.run(40)
    assert world.target() == 2, "measured values count from then on"
    assert "guess" not in world.decisions[-1].reason


def test_a_capacity_that_says_nothing_is_no_guess(make_world):
    load = Load(demand=40, new=0, arrival_rate=0.0, ms_per_request=None, batch=1.0)
    (version,) = make_world().desired_state().versions
    for rps in (None, 0.0, -1.0, float("nan"), float("inf")):
        version.metadata.metrics = {} if rps is None else {"capacity_rps": rps}
        assert with_guess(load, version) == load
    assert with_guess(load, None) == load
    version.metadata.metrics = {"capacity_rps": 50.0}
    assert with_guess(load, version).ms_per_request == 20.0
    measured = replace(load, ms_per_request=5.0)
    assert with_guess(measured, version) == measured


def test_unknown_demand_keeps_what_there_is(make_world, deployment):
    world = make_world(deployment(max_replicas=8))
    world.call_ms = 20.0
    world.outstanding[NAME] = 40
    world.run(10)
    world.outstanding[NAME] = 0
    world.gateway_known = False
    world.run(300)
    assert world.target() == 4
    assert not world.condition("DemandKnown").ok
    world.gateway_known = True
    world.run(40)
    assert world.target() == 1


def test_scales_to_zero_after_idle_and_wakes_on_the_first_request(make_world, deployment):
    world = make_world(deployment(min_replicas=0, max_replicas=2, scale_to_zero_after_s=45))
    world.run(44)
    assert world.target() == 1, "it starts once, to show that it loads"
    world.run(4)
    assert world.target() == 0
    assert world.names() == []
    assert world.condition("Ready").reason == "Asleep"
    world.outstanding[NAME] = 1
    world.round()
    assert world.target() == 1
    assert world.names() == ["digits-v1-0-2"], "the generation goes on counting"
    world.outstanding[NAME] = 0
    world.run(40)
    assert world.target() == 1
    world.run(8)
    assert world.target() == 0


def test_what_a_roll_over_waits_for_is_started_and_stays_until_it_is_over(make_world, deployment):
    world = make_world(deployment(min_replicas=0, max_replicas=1, scale_to_zero_after_s=1), start_s=5.0)
    world.run(5)
    assert world.names() == [], "it is at zero replicas, like an older version that returns"
    old, new, idle = Target(deployment="old"), Target(deployment=NAME), Target(deployment=NAME, weight=0)
    world.endpoints = [Endpoint(name="digits", targets=[idle, old], previous=[old], revision=1)]
    world.run(5)
    assert world.names() == [], "a share of nothing starts nothing"
    world.endpoints = [Endpoint(name="digits", targets=[new], previous=[old], revision=2)]
    world.run(20)
    assert len(world.names()) == 1, "it loads for longer than it may be idle"
    assert world.condition("Ready").ok
    world.endpoints = [Endpoint(name="digits", targets=[new], revision=3)]
    world.run(5)
    assert world.names() == []


def test_requests_between_two_looks_count_as_activity(make_world, deployment):
    world = make_world(deployment(min_replicas=0))
    for _ in range(20):
        world.arrived[NAME] = world.arrived.get(NAME, 0) + 1
        world.run(20)
    assert world.target() == 1
    world.run(61)
    assert world.target() == 0


def test_a_demand_event_wakes_and_unknown_demand_never_puts_to_sleep(make_world, deployment):
    world = make_world(deployment(min_replicas=0))
    world.run(70)
    assert world.target() == 0
    world.gateway_known = False
    world.run(5)
    assert world.target() == 0
    world.hints[NAME] = world.now
    world.round()
    assert world.target() == 1
    world.run(600)
    assert world.target() == 1


def test_an_override_wins_until_it_expires(make_world, deployment):
    until = datetime.fromtimestamp(1_700_000_000.0 + 60, UTC)
    world = make_world(
        deployment(max_replicas=2, override=Override(replicas=4, expires_at=until, force=True))
    )
    world.run(10)
    assert len(world.names()) == 4
    assert world.decisions[0].rule == "override"
    world.run(100)
    assert world.names() == ["digits-v1-0-1"]


def test_an_override_of_zero_pauses_in_spite_of_demand(make_world, deployment):
    world = make_world(deployment())
    world.run(5)
    world.outstanding[NAME] = 5
    world.overrides[NAME] = LocalOverride(0, None)
    world.run(5)
    assert world.names() == []
    assert world.condition("Ready").reason == "Paused"
    world.overrides[NAME] = LocalOverride(None, None)
    world.run(5)
    assert len(world.names()) == 1


def test_scale_down_takes_the_one_with_least_in_flight(make_world, deployment):
    world = make_world(deployment(min_replicas=3, max_replicas=3))
    world.run(5)
    busy = {"digits-v1-0-1": 5, "digits-v1-1-1": 1, "digits-v1-2-1": 7}
    for name, inflight in busy.items():
        world.workers[name].inflight = inflight
    world.deployments = [deployment(min_replicas=2, max_replicas=2)]
    world.round()
    assert world.names() == ["digits-v1-0-1", "digits-v1-2-1"]


def test_every_change_is_explained(make_world, deployment):
    world = make_world(deployment(max_replicas=8))
    world.call_ms = 20.0
    world.run(5)
    world.outstanding[NAME] = 40
    world.round()
    last = world.decisions[-1]
    assert (last.rule, last.before, last.after) == ("demand", 1, 4)
    assert last.inputs["demand"] == 40
    assert "40 requests and jobs" in last.reason
    assert len(last.actions) == 3


loads = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 500)), st.floats(0.5, 40)), max_size=12)
bounds = st.tuples(st.integers(0, 3), st.integers(0, 6))


@settings(max_examples=40, deadline=None)
@given(loads=loads, bounds=bounds, call_ms=st.one_of(st.none(), st.floats(0.1, 2000)))
def test_bounds_hold_and_unknown_never_lowers(make_world, deployment, loads, bounds, call_ms):
    low, high = bounds[0], bounds[0] + bounds[1]
    world = make_world(deployment(min_replicas=low, max_replicas=high))
    world.call_ms = call_ms
    world.round()
    for demand, seconds in loads:
        before = world.target()
        world.gateway_known = demand is not None
        world.outstanding[NAME] = demand or 0
        world.run(seconds, step=2.0)
        assert low <= world.target() <= high
        if demand is None:
            assert world.target() >= before


@settings(max_examples=200, deadline=None)
@given(
    less=st.integers(0, 10_000),
    more=st.integers(0, 10_000),
    rate=st.floats(0, 1e4),
    faster=st.floats(0, 1e4),
    call_ms=st.floats(0.01, 1e5),
    batch=st.floats(1, 64),
)
def test_the_recommendation_grows_with_the_load(less, more, rate, faster, call_ms, batch):
    low = Load(less, 0, rate, call_ms, batch)
    high = Load(less + more, 0, rate + faster, call_ms, batch)
    smaller, larger = recommend(low), recommend(high)
    assert 0 <= smaller <= larger
    assert less == 0 or recommend(Load(less, 0, 0.0, call_ms, batch)) <= less


@settings(max_examples=10, deadline=None)
@given(demand=st.integers(0, 200), call_ms=st.floats(1, 500))
def test_a_constant_load_does_not_flap(make_world, deployment, demand, call_ms):
    world = make_world(deployment(max_replicas=10))
    world.call_ms = call_ms
    world.outstanding[NAME] = demand
    world.run(60, step=1.0)
    settled, launched = world.target(), len(world.launched)
    world.run(200, step=1.0)
    assert world.target() == settled
    assert len(world.launched) == launched
