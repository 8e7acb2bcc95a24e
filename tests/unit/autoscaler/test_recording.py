"""Test that recorded snapshots give the same decisions when they are read back."""

from __future__ import annotations

from dataclasses import asdict, replace

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from services.autoscaler.domain.recording import (
    LastRound,
    RecordedRound,
    decide_again,
    read_round,
    write_chunk,
    write_round,
)
from services.autoscaler.domain.snapshot import Host, LocalOverride, Policy
from tests.unit.autoscaler.conftest import World, a_deployment

NAME = "digits-v1"


def kept(world: World, first: int = 0) -> dict:
    """Return the rounds of a world from ``first`` on, as read from disk."""
    pages = LastRound()
    rounds = [
        RecordedRound(now, write_round(snapshot, pages), plan.decisions)
        for _, snapshot, plan, now in world.rounds[first:]
    ]
    return orjson.loads(orjson.dumps(write_chunk(Policy(), world.rounds[first][0], rounds)))


events = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "load",
                "silence",
                "store",
                "kill",
                "change",
                "override",
                "hint",
                "jobs",
                "nothing",
                "registry",
                "room",
            ]
        ),
        st.integers(0, 300),
        st.floats(0.5, 15),
    ),
    min_size=2,
    max_size=12,
)


def let(world: World, event: str, number: int) -> None:
    match event:
        case "load":
            world.outstanding[NAME] = number
            world.arrived[NAME] = world.arrived.get(NAME, 0) + number
        case "silence":
            world.gateway_known = not world.gateway_known
        case "store":
            world.store_up = not world.store_up
        case "registry":
            world.desired_state_known = not world.desired_state_known
        case "kill" if world.names():
            world.die(world.names()[number % len(world.names())])
        case "change":
            world.deployments = [a_deployment(max_replicas=1 + number % 9, threads=1 + number % 2)]
        case "override":
            force = number % 3 == 0
            world.overrides = {NAME: LocalOverride(number % 40, None, force)} if number % 2 else {}
        case "room":
            world.room = Host(1 + number % 4, 8_192, number * 16) if number % 5 else None
            for worker in world.workers.values():
                worker.running = replace(worker.running, memory_mb=16 * (number % 9))
        case "hint":
            world.hints[NAME] = world.now
        case "jobs":
            world.jobs = None if number % 3 == 0 else {NAME: number}


@settings(max_examples=40, deadline=None)
@given(events=events, call_ms=st.floats(1, 500), first=st.integers(0, 20))
def test_whatever_happened_is_decided_the_same_again(events, call_ms, first):
    world = World(a_deployment(min_replicas=0, max_replicas=9, scaling={"aggressiveness": "latency"}))
    world.call_ms = call_ms
    for event, number, seconds in events:
        let(world, event, number)
        for worker in world.workers.values():
            worker.completed += number
            worker.busy_ms += number * call_ms
        world.run(seconds)
    first = min(first, len(world.rounds) - 1)
    found = list(decide_again([kept(world, first)]))
    assert len(found) == len(world.rounds) - first
    for _, then, now in found:
        assert then == now


def test_sequences_are_recorded():
    world = World(a_deployment(min_replicas=1, max_replicas=4))
    world.sequence_slots = 3
    world.run(5)
    world.workers[world.names()[0]].sequences = 8
    world.run(5)
    found = list(decide_again([kept(world)]))
    assert len(found) == len(world.rounds)
    assert all(then == now for _, then, now in found)
    assert max(len(plan.actions) for _, _, plan, _ in world.rounds) == 2, "two more replicas were started"


def test_a_round_is_told_by_what_changed():
    world = World(a_deployment(min_replicas=3, max_replicas=3))
    world.run(30)
    pages = LastRound()
    sizes = [len(orjson.dumps(write_round(snapshot, pages))) for _, snapshot, _, _ in world.rounds]
    assert sizes[0] > 500
    assert sizes[-1] < 100


def test_nothing_is_not_unknown():
    world = World(a_deployment())
    world.run(2)
    world.store_up, world.jobs = False, None
    world.run(2)
    world.store_up, world.jobs = True, {}
    world.run(2)
    writing, reading = LastRound(), LastRound()
    for _, snapshot, _, _ in world.rounds:
        back = read_round(orjson.loads(orjson.dumps(write_round(snapshot, writing))), reading)
        assert (back.reports is None) == (snapshot.reports is None)
        assert (back.gateways is None) == (snapshot.gateways is None)
        assert back.jobs == snapshot.jobs
        assert back.running == snapshot.running
        assert asdict(back)["desired_state"] == asdict(snapshot)["desired_state"]


def test_a_chunk_goes_on_where_the_one_before_it_ended():
    world = World(a_deployment(max_replicas=9))
    world.call_ms = 20.0
    for number in range(8):
        world.outstanding[NAME] = 30 * (number % 3)
        world.run(10)
    pages, chunks = LastRound(), []
    for start in range(0, len(world.rounds), 20):
        part = world.rounds[start : start + 20]
        rounds = [RecordedRound(now, write_round(seen, pages), plan.decisions) for _, seen, plan, now in part]
        before = part[0][0] if start == 0 else None
        chunks.append(orjson.loads(orjson.dumps(write_chunk(Policy(), before, rounds))))
    found = list(decide_again(chunks))
    assert len(found) == len(world.rounds)
    assert all(then == now for _, then, now in found)
    assert sum(len(then) for _, then, _ in found) == len(world.decisions)
