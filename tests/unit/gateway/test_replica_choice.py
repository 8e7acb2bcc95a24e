"""The choice of a replica: the one that has read most of the prompt, under a cap of its load."""

from __future__ import annotations

from collections import Counter

import pytest

from services.gateway.domain.replica_choice import (
    Choice,
    PrefixMemory,
    ReplicaSlots,
    choose,
    is_loaded,
)

pytestmark = pytest.mark.unit

FREE = [ReplicaSlots(f"m-0-{n}", 0, 8) for n in range(4)]
BLOCKS = [b"block%03d" % n for n in range(10)]


def test_the_replica_that_has_read_most_is_preferred():
    memory = PrefixMemory()
    memory.read_by(BLOCKS[:8], "m-0-1")
    memory.read_by(BLOCKS[:3], "m-0-2")
    assert memory.depths(BLOCKS) == {"m-0-2": 3, "m-0-1": 8}
    assert choose(BLOCKS, memory, FREE, {}) == Choice("m-0-1", "hit")
    assert choose(BLOCKS[:3], memory, FREE, {}) == Choice("m-0-2", "hit")


def test_a_replica_that_is_not_ready_is_not_preferred():
    memory = PrefixMemory()
    memory.read_by(BLOCKS, "m-0-9")
    assert choose(BLOCKS, memory, FREE, {}).outcome == "first"


def test_gateways_agree_on_a_new_prompt():
    chosen = choose(BLOCKS, PrefixMemory(), FREE, {})
    assert chosen.outcome == "first"
    assert choose(BLOCKS, PrefixMemory(), FREE[::-1], {}) == chosen
    assert choose([*BLOCKS[:4], b"other end"], PrefixMemory(), FREE, {}) == chosen
    assert choose(BLOCKS, PrefixMemory(), [r for r in FREE if r.name != "m-0-0"], {}).replica is not None


def test_new_prompts_spread_over_the_replicas():
    chosen = Counter(choose([b"%d" % n], PrefixMemory(), FREE, {}).replica for n in range(400))
    assert len(chosen) == 4
    assert max(chosen.values()) < 150


def test_a_lost_replica_moves_only_its_own_prompts():
    before = {n: choose([b"%d" % n], PrefixMemory(), FREE, {}).replica for n in range(100)}
    for n, replica in before.items():
        after = choose([b"%d" % n], PrefixMemory(), FREE[1:], {}).replica
        assert after == replica or replica == FREE[0].name


@pytest.mark.parametrize(
    ("inflight", "loaded"),
    [({}, False), ({"m-0-0": 1}, False), ({"m-0-0": 2}, True), ({"m-0-0": 6, "m-0-1": 8, "m-0-2": 8}, False)],
)
def test_a_replica_above_its_share_is_loaded(inflight, loaded):
    assert is_loaded(FREE[0], FREE, inflight) is loaded


def test_a_replica_without_a_free_slot_is_loaded():
    full = [ReplicaSlots("m-0-0", 8, 8), *FREE[1:]]
    memory = PrefixMemory()
    memory.read_by(BLOCKS, "m-0-0")
    assert choose(BLOCKS, memory, full, {}) == Choice(None, "loaded")
    even = {each.name: 8 for each in FREE}
    assert choose(BLOCKS, memory, FREE, even) == Choice(None, "loaded")


def test_one_hot_prompt_is_spread():
    """Each request stays. The preferred replica gets no more than the cap allows."""
    memory, inflight = PrefixMemory(), Counter[str]()
    memory.read_by(BLOCKS, "m-0-0")
    for n in range(20):
        chosen = choose(BLOCKS, memory, FREE, inflight).replica
        inflight[chosen or FREE[1 + n % 3].name] += 1
    assert inflight["m-0-0"] <= 1.25 * 5 + 1


@pytest.mark.parametrize("ready", [[], FREE[:1]])
def test_without_a_choice_none_is_preferred(ready):
    assert choose(BLOCKS, PrefixMemory(), ready, {}) == Choice(None, "none")
    assert choose([], PrefixMemory(), FREE, {}) == Choice(None, "none")


def test_old_blocks_are_forgotten():
    memory = PrefixMemory(limit=5)
    memory.read_by(BLOCKS[:5], "m-0-1")
    memory.read_by(BLOCKS[:1], "m-0-1")
    memory.read_by([b"new"], "m-0-2")
    assert memory.depths(BLOCKS) == {"m-0-1": 1}
    assert memory.depths([b"new"]) == {"m-0-2": 1}
