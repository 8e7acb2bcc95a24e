"""The memory of a gateway: which replica has read a prompt, and how many requests each replica has."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from services.gateway.application.prefix_affinity import PREFIXES, PrefixAffinity
from services.gateway.domain.replica_choice import ReplicaSlots

pytestmark = pytest.mark.unit

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "a" * 1000}]}


@pytest.fixture
def ready() -> list[ReplicaSlots]:
    return [ReplicaSlots(f"m-0-{n}", 0, 8) for n in range(2)]


@pytest.fixture
def affinity(ready) -> PrefixAffinity:
    return PrefixAffinity(lambda deployment: ready)


def place(affinity: PrefixAffinity, salt: bytes = b"", wait_ms: float = 100.0):
    return affinity.place("m", wait_ms, CHAT, BODY, salt)


def counted(outcome: str) -> float:
    return PREFIXES.labels(outcome)._value.get()


def test_a_prompt_returns_to_the_replica_that_has_read_it(affinity):
    with place(affinity) as first:
        other = "m-0-1" if first.replica == "m-0-0" else "m-0-0"
        stolen = counted("stolen")
        first.taken_by(other)
        assert counted("stolen") == stolen + 1
    again, hits = place(affinity), counted("hit")
    assert again.replica == other
    again.taken_by(other)
    assert counted("hit") == hits + 1


def test_the_load_counts_until_the_end(affinity):
    with ExitStack() as running:
        preferred = [running.enter_context(place(affinity)).replica for _ in range(6)]
        assert preferred[:2] == [preferred[0]] * 2
        assert None in preferred, "the replica has more than its share"
    assert place(affinity).replica == preferred[0]


def test_a_later_answer_does_not_move_a_request(affinity):
    placement = place(affinity)
    placement.taken_by("m-0-0")
    placement.taken_by("m-0-1")
    placement.taken_by(None)
    assert place(affinity).replica == "m-0-0"


def test_callers_have_prompts_of_their_own(affinity):
    placement = place(affinity, b"one")
    placement.taken_by("m-0-0")
    hits = counted("hit")
    place(affinity, b"other").taken_by("m-0-0")
    assert counted("hit") == hits


def test_no_preference_without_a_wait_or_a_choice(affinity, ready):
    assert place(affinity, wait_ms=0).replica is None
    del ready[1]
    assert place(affinity).replica is None
