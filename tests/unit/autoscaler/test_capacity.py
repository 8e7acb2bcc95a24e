"""Test how the host limits the replicas of all Deployments, and the starts at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.autoscaler.domain.capacity import (
    HostClaim,
    ReplicaSize,
    Room,
    admitted,
    room_of,
    shares,
    size_of,
)
from services.autoscaler.domain.explain import explain
from services.autoscaler.domain.snapshot import Host, LocalOverride, Policy
from tests.unit.autoscaler.conftest import a_deployment
from tidegate.kernel.protocol.models import Endpoint, Rollout, RolloutPhase, Target, Version

NAME = "digits-v1"
SMALL = ReplicaSize(100, 1)


def claim(name: str, desired: int, *, low: int = 0, held: int = 0, size: ReplicaSize = SMALL) -> HostClaim:
    return HostClaim(name, low, desired, held, size)


def test_a_replica_takes_what_is_declared_else_measured_else_assumed():
    policy = Policy(replica_memory_mb=256)
    plain, declared = a_deployment(), a_deployment(resources={"memory_mb": 512, "cpus": 2.5})
    assert size_of(declared, 900, policy) == ReplicaSize(512.0, 2.5, "declared")
    assert size_of(plain, 900, policy) == ReplicaSize(900.0, 1.0, "measured")
    assert size_of(plain, 0, policy) == ReplicaSize(256.0, 1.0, "assumed")


def test_a_language_model_is_assumed_to_need_more_than_its_weights():
    version = Version.model_validate({
        "model": "m", "number": 1, "format": "llm", "artifact_sha256": "0" * 64, "artifact_size": 4 * 2**30,
        "filename": "m.gguf", "created_at": "2026-01-01T00:00:00Z",
    })  # fmt: skip
    policy, estimate = Policy(replica_memory_mb=256), 1.25 * 4096 + 512
    assert size_of(a_deployment(), 0, policy, version) == ReplicaSize(
        estimate, 1.0, "estimated from the size of the weights"
    )
    assert size_of(a_deployment(), 900, policy, version) == ReplicaSize(900.0, 1.0, "measured")
    other = version.model_copy(update={"format": "onnx"})
    assert size_of(a_deployment(), 0, policy, other) == ReplicaSize(256.0, 1.0, "assumed")
    roomy = Policy(replica_memory_mb=8192)
    assert size_of(a_deployment(), 0, roomy, version) == ReplicaSize(8192.0, 1.0, "assumed")


def test_room_is_what_is_available_without_what_was_promised():
    policy = Policy(host_memory=0.9, replicas_per_core=2)
    starting, grown = (ReplicaSize(300, 1), 50), (ReplicaSize(300, 1), 400)
    assert room_of(Host(4, 10_000, 5_000), policy, [starting, grown]) == Room(5_000 - 1_000 - 250, 6)


def test_of_a_machine_of_which_only_the_size_is_known_all_that_exists_counts():
    there = [(ReplicaSize(300, 1), 0), (ReplicaSize(500, 2), 0)]
    assert room_of(Host(2, 2_000, None), Policy(host_memory=1.0), there) == Room(1_200, 2 * 16 - 3)


def test_where_everything_fits_everybody_has_what_it_wants():
    assert shares([claim("a", 3), claim("b", 0), claim("c", 5)], Room(800, 8)) == {"a": 3, "b": 0, "c": 5}


def test_minimums_come_before_demand():
    found = shares([claim("greedy", 100, low=1), claim("modest", 4, low=4)], Room(600, 600))
    assert found == {"greedy": 2, "modest": 4}


def test_demand_shares_the_rest_by_dominant_share():
    large, many = ReplicaSize(300, 1), ReplicaSize(100, 3)
    found = shares([claim("large", 99, size=large), claim("many", 99, size=many)], Room(900, 9))
    assert found == {"large": 2, "many": 2}, "one has two thirds of the memory, the other of the cores"


def test_what_runs_makes_room_for_one_that_has_less_than_its_share():
    found = shares([claim("old", 10, held=10), claim("new", 1, low=1)], Room(0, 0))
    assert found == {"old": 9, "new": 1}


def test_nothing_that_runs_is_ended_because_memory_is_short():
    claims = [claim("a", 4, held=4), claim("b", 2, held=2)]
    assert shares(claims, Room(-500, -5)) == {"a": 4, "b": 2}


def test_shares_of_an_over_full_host_are_settled_at_once():
    new, old = claim("new", 2, size=ReplicaSize(300, 0.5)), claim("old", 3, held=3, size=ReplicaSize(300, 1))
    assert shares([new, old], Room(0, -1)) == {"new": 2, "old": 1}, "one and two first, then two and one"


def test_of_equals_the_one_that_has_its_replica_keeps_it():
    assert shares([claim("a", 2, held=1), claim("b", 2, held=2)], Room(0, 0)) == {"a": 1, "b": 2}


claims = st.lists(
    st.builds(
        lambda low, more, held, memory, cores: HostClaim(
            "", low, low + more, min(held, low + more), ReplicaSize(memory, cores)
        ),
        st.integers(0, 5),
        st.integers(0, 300),
        st.integers(0, 9),
        st.integers(1, 900),
        st.sampled_from([0.5, 1, 4]),
    ),
    max_size=6,
).map(lambda found: [replace(each, name=f"d{place}") for place, each in enumerate(found)])


@settings(max_examples=150, deadline=None)
@given(found=claims, memory=st.integers(-500, 20_000), cores=st.integers(-8, 64))
def test_shares_never_exceed_the_room_and_are_stable(found, memory, cores):
    room = Room(memory, cores)
    granted = shares(found, room)
    assert all(0 <= granted[each.name] <= each.desired for each in found)
    taken = sum((granted[each.name] - each.held) * each.size.memory_mb for each in found)
    assert taken <= max(0, memory) + 1e-3
    assert sum((granted[each.name] - each.held) * each.size.cores for each in found) <= max(0, cores) + 1e-3
    # When each Deployment has its share, nothing changes any more.
    settled = [replace(each, held=granted[each.name]) for each in found]
    used = sum(each.size.memory_mb * (granted[each.name] - each.held) for each in found)
    used_cores = sum(each.size.cores * (granted[each.name] - each.held) for each in found)
    assert shares(settled, Room(memory - used, cores - used_cores)) == granted


def test_starts_are_paced_and_minimums_start_first():
    claims = {"a": claim("a", 9, low=1, held=1), "b": claim("b", 3, low=2), "c": claim("c", 1)}
    assert admitted({"a": 8, "b": 3, "c": 1}, claims, Room(9999, 99), 4) == {"a": 1, "b": 2, "c": 1}
    assert admitted({"a": 8}, claims, Room(250, 99), None) == {"a": 2}, "a draining replica uses room"
    assert admitted({"a": 8, "b": 3}, claims, Room(9999, 99), 0) == {"a": 0, "b": 0}


@pytest.fixture
def small_host() -> Host:
    return Host(2, 8_192, 4_096)


def test_an_override_is_bounded_by_the_maximum_unless_it_is_forced(make_world, deployment):
    world = make_world(deployment(max_replicas=1))
    world.overrides[NAME] = LocalOverride(396, None)
    world.run(10)
    assert len(world.names()) == 1
    reason = world.decisions[-1].reason
    assert "an operator set the replicas to 396; max_replicas is 1, so the target is 1" in reason
    world.overrides[NAME] = LocalOverride(3, None, force=True)
    world.run(10)
    assert len(world.names()) == 3


def test_however_many_are_forced_the_host_bounds_them_and_the_pace_does(make_world, deployment, small_host):
    world = make_world(deployment(max_replicas=1), policy=Policy(replicas_per_core=6))
    world.room = small_host
    world.overrides[NAME] = LocalOverride(396, None, force=True)
    plan = world.round()
    assert len(plan.actions) == 4, "twice the cores start at once"
    assert world.target() == 12
    world.run(30)
    assert len(world.names()) == 12
    assert max(sum(at == when for when, _ in world.launched) for at, _ in world.launched) == 4
    full = world.condition("Placeable")
    assert full.reason == "HostFull"
    assert (
        "it has room for 12 of 396 replicas. The other 384 need 98,304 MiB (256 each, assumed; "
        in full.message
    )
    document = explain(world.deployments[0], world.snapshot(), world.state, world.policy, world.now)
    assert document["rule"] == "host full"
    assert document["desired"] == 12


def test_a_full_host_lets_go_of_demand_for_the_minimum_of_another(make_world, deployment, small_host):
    other = deployment(name="other", min_replicas=2, max_replicas=4)
    world = make_world(deployment(max_replicas=50), policy=Policy(replicas_per_core=4))
    world.room = small_host
    world.overrides[NAME] = LocalOverride(50, None)
    world.run(30)
    assert len(world.names()) == 8
    world.deployments.append(other)
    world.run(30)
    assert len(world.names("other")) == 2
    assert len(world.names()) == 6


def rolling(phase: RolloutPhase = "running") -> Endpoint:
    rollout = Rollout(deployment="digits-v2", base=[Target(deployment=NAME)], id="r", phase=phase)
    return Endpoint(name="digits", targets=[Target(deployment=NAME)], rollout=rollout, revision=1)


def test_on_a_full_host_a_canary_takes_the_places_of_its_baseline_one_by_one(
    make_world, deployment, small_host
):
    world = make_world(deployment(min_replicas=4, max_replicas=4), policy=Policy(replicas_per_core=2))
    world.room = small_host
    world.run(10)
    assert len(world.names()) == 4
    world.endpoints = [rolling()]
    for places in (1, 2):  # of the canary: its share of the replicas grows with its share of the traffic
        canary = deployment(name="digits-v2", min_replicas=places, max_replicas=4)
        world.deployments = [world.deployments[0], canary]
        world.run(30)
        assert (len(world.names()), len(world.names("digits-v2"))) == (4 - places, places)


def test_a_canary_for_which_there_is_no_place_waits_and_says_so(make_world, deployment, small_host):
    world = make_world(deployment(max_replicas=1, min_replicas=1), policy=Policy(replicas_per_core=0.5))
    world.room = small_host
    world.run(10)
    world.deployments.append(deployment(name="digits-v2", min_replicas=1, max_replicas=1))
    world.endpoints = [rolling()]
    world.run(60)
    assert (len(world.names()), len(world.names("digits-v2"))) == (1, 0)
    full = world.condition("Placeable", "digits-v2")
    assert (full.ok, full.reason) == (False, "HostFull")
    # A swap puts the present version to sleep, so that its place is free before it has been idle for long.
    world.deployments[0] = deployment(max_replicas=1, min_replicas=0, scale_to_zero_after_s=30)
    world.endpoints = [rolling("promoted")]
    world.run(10)
    assert (len(world.names()), len(world.names("digits-v2"))) == (0, 1)


def test_a_new_configuration_rolls_on_a_full_host(make_world, deployment, small_host):
    policy = Policy(replicas_per_core=1)
    world = make_world(deployment(min_replicas=2, max_replicas=2), policy=policy)
    world.room = small_host
    world.run(10)
    old = set(world.names())
    world.deployments = [deployment(min_replicas=2, max_replicas=2, threads=2)]
    world.run(30)
    assert len(world.names()) == 2
    assert not old & set(world.names())


def test_a_start_that_waits_for_something_does_not_hold_up_the_others(make_world, deployment, small_host):
    slow = deployment(name="slow", min_replicas=4, max_replicas=4, start_timeout_s=600)
    world = make_world(slow, start_s=300.0)
    world.room = small_host
    world.run(5)
    world.deployments.append(deployment())
    world.run(5)
    assert not world.names()
    world.run(20)
    assert world.names() == [f"{NAME}-0-1"]


def test_memory_that_was_measured_counts_from_then_on(make_world, deployment, small_host):
    world = make_world(deployment(max_replicas=50), policy=Policy(host_memory=1.0))
    world.room = small_host
    world.run(5)
    (worker,) = world.workers.values()
    worker.running = replace(worker.running, memory_mb=1_024)
    world.overrides[NAME] = LocalOverride(50, None)
    world.run(30)
    # Each existing replica uses its memory, or will use it: 4,096 MiB are left for four.
    assert len(world.names()) == 5
    assert "1,024 each, measured" in world.decisions[-1].reason
