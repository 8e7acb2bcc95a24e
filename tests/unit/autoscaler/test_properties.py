"""Test properties of all policies and loads: bounds, monotonicity, stability, no scale-down on a guess."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from services.autoscaler.domain.bounds import bounds
from services.autoscaler.domain.memory import DeploymentMemory, Load
from services.autoscaler.domain.rules import ReplicaCounts
from services.autoscaler.domain.snapshot import Policy
from services.autoscaler.domain.target import Circumstances, target
from tests.unit.autoscaler.conftest import START, World, a_deployment
from tidegate.kernel.protocol.models import Deployment

NAME = "digits-v1"


def or_none(strategy):
    return st.one_of(st.none(), strategy)


windows = st.builds(
    lambda hour, length, low, more: {
        "start": f"{hour % 60} {hour % 24} * * *",
        "end": f"{(hour + length) % 60} {(hour + length) % 24} * * *",
        "time_zone": "Europe/Berlin",
        "min_replicas": low,
        "max_replicas": None if more is None else max(1, (low or 0) + more),
    },
    hour=st.integers(0, 59),
    length=st.integers(1, 23),
    low=st.integers(0, 5),
    more=or_none(st.integers(0, 5)),
)
scalings = st.builds(
    lambda cap, **given: {
        **given,
        **({} if cap is None else {"price_per_hour": 2.0, "max_cost_per_hour": 2.0 * cap}),
    },
    cap=or_none(st.integers(1, 9)),
    aggressiveness=st.sampled_from(["economy", "balanced", "latency"]),
    target_utilization=or_none(st.floats(0.05, 1)),
    backlog_per_replica=or_none(st.floats(0.5, 100)),
    schedule=st.lists(windows, max_size=2),
    up_window_s=or_none(st.floats(0, 30)),
    down_window_s=or_none(st.floats(0, 120)),
    max_up_per_minute=or_none(st.integers(1, 5)),
    max_down_per_minute=or_none(st.integers(1, 5)),
    panic_factor=or_none(st.sampled_from([0.0, 1.5, 2.0, 4.0])),
)
unscheduled = scalings.map(lambda given: {**given, "schedule": []})
deployments = st.builds(
    lambda scaling, low, more, wait: a_deployment(
        min_replicas=low, max_replicas=max(1, low + more), target_wait_ms=wait, scaling=scaling
    ),
    scaling=scalings,
    low=st.integers(0, 3),
    more=st.integers(0, 8),
    wait=st.floats(1, 5000),
)
steps = st.lists(
    st.tuples(or_none(st.integers(0, 500)), st.integers(0, 300), st.floats(0.5, 40)), min_size=1, max_size=10
)
times = or_none(st.floats(0.1, 2000))


def within(deployment: Deployment, world: World) -> bool:
    limits = bounds(deployment, world.now, 0.0)
    ahead = bounds(deployment, world.now, world.start_s + 1.0)
    return limits.low <= world.target() <= max(limits.high, ahead.high)


@settings(max_examples=50, deadline=None)
@given(deployment=deployments, load=steps, call_ms=times)
def test_the_bounds_hold_and_the_budget_does(deployment, load, call_ms):
    world = World(deployment)
    world.call_ms = call_ms
    afford = deployment.scaling.max_cost_per_hour
    for demand, arrivals, seconds in load:
        world.gateway_known = demand is not None
        world.outstanding[NAME] = demand or 0
        end = world.now + seconds
        while world.now < end:
            world.arrived[NAME] = world.arrived.get(NAME, 0) + arrivals
            world.round()
            assert within(deployment, world)
            assert afford is None or world.target() * 2.0 <= afford
            assert len(world.names()) <= world.target()
            world.now += 2.0


@settings(max_examples=50, deadline=None)
@given(scaling=unscheduled, load=steps, call_ms=times)
def test_what_is_not_known_never_scales_down(scaling, load, call_ms):
    world = World(a_deployment(min_replicas=0, max_replicas=9, scaling=scaling))
    world.call_ms = call_ms
    for demand, arrivals, seconds in load:
        before = world.target() if world.state.deployments else 0
        world.gateway_known, world.outstanding[NAME] = demand is not None, demand or 0
        world.store_up = arrivals % 3 > 0
        known = world.gateway_known and world.store_up
        world.arrived[NAME] = world.arrived.get(NAME, 0) + arrivals
        world.run(seconds, step=2.0)
        assert known or world.target() >= before


@settings(max_examples=300, deadline=None)
@given(
    deployment=deployments,
    demand=st.integers(0, 2000),
    more=st.integers(0, 2000),
    rates=st.lists(st.floats(0, 2000), min_size=8, max_size=8),
    utilization=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    call_ms=times,
    batch=st.floats(1, 32),
    fleet=st.builds(ReplicaCounts, st.integers(0, 9), st.integers(0, 3), st.floats(0, 60)),
    current=st.integers(0, 9),
    recent=st.lists(st.tuples(st.floats(0.1, 100), st.integers(0, 9)), max_size=4),
    panicking=st.booleans(),
)
def test_more_load_never_asks_for_less(
    deployment, demand, more, rates, utilization, call_ms, batch, fleet, current, recent, panicking
):
    memory = DeploymentMemory(
        current,
        START,
        recommended=tuple((START - ago, n) for ago, n in sorted(recent, key=lambda r: -r[0])),
        moves=tuple((START - ago / 2, n - 4) for ago, n in recent),
        panic_until=START + 5 if panicking else 0.0,
    )
    less = Load(
        demand,
        0,
        rates[0],
        call_ms,
        batch,
        burst_rate=rates[1],
        trend=rates[2] / 10,
        expected=rates[3],
        utilization=min(utilization),
    )
    bigger = replace(
        less,
        demand=demand + more,
        arrival_rate=rates[0] + rates[4],
        burst_rate=rates[1] + rates[5],
        trend=(rates[2] + rates[6]) / 10,
        expected=rates[3] + rates[7],
        utilization=max(utilization),
    )
    around = Circumstances(fleet, None, None)
    smaller, _ = target(deployment, less, memory, around, Policy(), START)
    larger, _ = target(deployment, bigger, memory, around, Policy(), START)
    assert smaller.replicas <= larger.replicas, (smaller, larger)


@settings(max_examples=10, deadline=None)
@given(scaling=unscheduled, demand=st.integers(0, 200), rate=st.integers(0, 100), call_ms=st.floats(1, 500))
def test_a_constant_load_does_not_flap(scaling, demand, rate, call_ms):
    world = World(a_deployment(min_replicas=1, max_replicas=8, scaling=scaling))
    world.call_ms = call_ms
    world.outstanding[NAME] = demand

    def pass_time(seconds: float) -> list[int]:
        targets = []
        for _ in range(int(seconds)):
            world.arrived[NAME] = world.arrived.get(NAME, 0) + rate
            world.round()
            world.now += 1.0
            targets.append(world.target())
        return targets

    way_up = pass_time(600)
    assert all(a <= b for a, b in pairwise(way_up)), "no replica is removed meanwhile"
    assert set(pass_time(300)) == {way_up[-1]}
