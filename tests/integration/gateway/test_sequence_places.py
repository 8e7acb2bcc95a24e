"""The places of sequences in the real store: slots, ends, idle sequences, and lost replicas."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest

from services.gateway.adapters.store.sequences import PLACE, SequencePlaces
from services.gateway.domain.sequences import Place, SequenceSlots, Times
from tests.conftest import PATIENCE_S

LONG, SHORT = Times(600_000, 1000), Times(0, 30)
FIRST, SECOND = b"first", b"second"


@pytest.fixture
async def places(valkey_url: str) -> AsyncIterator[SequencePlaces]:
    found = SequencePlaces.connect(valkey_url)
    yield found
    await found.close()


@pytest.fixture
def replicas(fresh: Callable[[str], str]) -> list[SequenceSlots]:
    return [SequenceSlots(fresh("sums-0"), 3), SequenceSlots(fresh("sums-1"), 2)]


async def test_the_slots_are_never_exceeded(places, replicas, fresh):
    keys = [fresh("key") for _ in range(12)]
    found = await asyncio.gather(*(places.start(key, "sums", replicas, "t", FIRST, LONG) for key in keys))
    assert Counter(each.replica for each in found if each) == {replicas[0].name: 3, replicas[1].name: 2}
    assert sum(each is None for each in found) == 7
    placed = next(at for at, each in enumerate(found) if each)
    await places.end(keys[placed], found[placed])
    assert await places.find(keys[placed]) is None
    again = await places.start(fresh("key"), "sums", replicas, "t", FIRST, LONG)
    assert again is not None
    assert again.replica == found[placed].replica, "the end has freed a slot"


async def test_a_second_start_stays_at_its_replica(places, replicas, fresh):
    key = fresh("key")
    first = await places.start(key, "sums", replicas, "one", FIRST, LONG)
    for _ in range(4):
        assert await places.start(fresh("key"), "sums", replicas, "t", FIRST, LONG) is not None
    second = await places.start(key, "sums", replicas, "two", FIRST, LONG)
    assert second == first._replace(token="two")
    await places.end(key, first)
    assert await places.find(key) == second, "the end of the first one does not end the second one"
    assert await places.start(fresh("key"), "sums", replicas, "t", FIRST, LONG) is None


async def test_an_idle_sequence_frees_its_slot(places, replicas, fresh):
    one, key = replicas[1:], fresh("key")
    kept = [await places.start(fresh("key"), "sums", one, "t", FIRST, LONG)]
    idle = await places.start(key, "sums", one, "t", FIRST, LONG)
    assert idle is not None
    assert await places.start(fresh("key"), "sums", one, "t", FIRST, LONG) is None
    await places.keep(key, idle, FIRST, SHORT)
    end = time.monotonic() + PATIENCE_S
    while (found := await places.start(fresh("key"), "sums", one, "t", FIRST, LONG)) is None:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    assert found.replica == kept[0].replica
    assert await places.find(key) is None
    await places.keep(key, idle, FIRST, LONG)
    assert await places.find(key) is None, "what has ended does not come back"


async def test_no_gateway_shortens_the_time_that_another_one_needs(places, replicas, fresh, valkey_url):
    other, key = SequencePlaces.connect(valkey_url), fresh("key")
    place = await places.start(key, "sums", replicas, "t", FIRST, Times(1, 600_000))
    await places.keep(key, place, FIRST, LONG)
    await other.keep(key, place, SECOND, Times(5, 30))
    await other.keep(key, place, SECOND, SHORT)
    assert await left_ms(places, key) > 500_000, "the first request is open"
    await places.keep(key, place, FIRST, SHORT)
    assert await left_ms(places, key) <= 30, "both have ended, so the sequence is idle"
    await other.close()


async def left_ms(places: SequencePlaces, key: str) -> int:
    return int(await places._redis.pttl(PLACE + key))


async def test_a_lost_sequence_is_remembered(places, replicas, fresh):
    key = fresh("key")
    place = await places.start(key, "sums", replicas, "t", FIRST, LONG)
    await places.end(key, place, lost=True)
    assert await places.find(key) == Place("sums", place.replica, "lost", lost=True)
    again = await places.start(key, "sums", replicas, "t", FIRST, LONG)
    assert await places.find(key) == again
