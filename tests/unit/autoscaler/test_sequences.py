"""Test the scaling of stateful models: replicas for their sequences, and which of them are drained."""

from __future__ import annotations

from tests.unit.autoscaler.conftest import World, a_deployment


def a_world(**given) -> World:
    world = World(a_deployment(max_replicas=5, **given))
    world.sequence_slots = 10
    world.run(5)
    return world


def test_replicas_for_all_sequences():
    world = a_world(min_replicas=1)
    world.workers[world.names()[0]].sequences = 10
    world.run(5)
    assert world.target() == 1, "the sequences fit"
    world.outstanding["digits-v1"] = 1
    world.run(5)
    assert world.target() == 2, "no slot is free for a sequence that starts"


def test_a_replica_with_sequences_is_not_put_to_sleep():
    world = a_world(min_replicas=0, scale_to_zero_after_s=5)
    world.hints["digits-v1"] = world.now
    world.run(10)
    (name,) = world.names()
    world.workers[name].sequences = 1
    world.run(60)
    assert world.names() == [name]
    world.workers[name].sequences = 0
    world.run(200)
    assert world.names() == []


def test_the_replica_with_the_fewest_sequences_is_drained():
    world = a_world(min_replicas=3)
    first, second, third = world.names()
    for name, sequences in ((first, 2), (second, 1), (third, 3)):
        world.workers[name].sequences = sequences
    world.deployments = [a_deployment(max_replicas=5, min_replicas=1)]
    world.run(200)
    assert world.names() == [third]
