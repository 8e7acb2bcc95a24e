"""The turns of the bands, and the room for requests to a language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.domain.llm_bands import BandTurns, LlmRoom, Source, job_slots
from tidegate.kernel.protocol.llm import BAND_WEIGHTS, Band

pytestmark = pytest.mark.unit

BANDS: tuple[Band, ...] = tuple(BAND_WEIGHTS)


def take(turns: BandTurns, has: Callable[[Source], bool]) -> Source:
    """Take from the first queue in the order that has a request."""
    found = next(source for source in turns.order() if has(source))
    turns.served(found)
    return found


def test_bands_share_the_slots_by_weight():
    turns = BandTurns()
    taken = [take(turns, lambda source: not source.own).band for _ in range(210)]
    assert Counter(taken) == {"high": 160, "normal": 40, "low": 10}
    first = Counter(taken[:21])
    assert first == {"high": 16, "normal": 4, "low": 1}, "in each round, not only in the end"


def test_no_band_waits_for_a_whole_turn_of_another():
    taken = [source.band for turns in [BandTurns()] for source in [take(turns, bool) for _ in range(42)]]
    longest = max(len(run) for run in "".join(band[0] for band in taken).replace("n", " ").split())
    assert longest <= 6, "normal requests come between those of the band high"


def test_an_empty_band_saves_up_no_turns():
    turns = BandTurns()
    for _ in range(1000):
        take(turns, lambda source: source.band == "high")
    taken = Counter(take(turns, bool).band for _ in range(21))
    assert taken["high"] >= 14
    assert taken["low"] <= 2


def test_all_slots_go_to_the_only_band():
    turns = BandTurns()
    assert {take(turns, lambda source: source.band == "low").band for _ in range(50)} == {"low"}


def test_the_own_queue_and_the_shared_one_alternate():
    turns = BandTurns()
    taken = Counter(take(turns, lambda source: source.band == "normal").own for _ in range(10))
    assert taken == {True: 5, False: 5}
    assert all(not take(turns, lambda source: not source.own).own for _ in range(5))


@given(waiting=st.lists(st.sets(st.sampled_from(BANDS), min_size=1), min_size=1, max_size=300))
def test_a_waiting_band_is_served_within_its_share(waiting: list[set[Band]]):
    turns, since = BandTurns(), dict.fromkeys(BANDS, 0)
    for bands in waiting:
        band = take(turns, lambda source, bands=bands: source.band in bands).band  # type: ignore[misc]
        for other in BANDS:
            since[other] = since[other] + 1 if other in bands and other != band else 0
        # A round has 21 turns. One more may pass because of the turn that an empty band keeps.
        assert since["low"] <= 43
        assert since["normal"] <= 13
        assert since["high"] <= 8


def test_no_more_requests_than_slots():
    room = LlmRoom(2, None)
    releases = [room.take(10**6), room.take(10**6)]
    assert not room.fits(1)
    releases[0]()
    assert room.fits(1)
    assert not room.fits(1, others=1), "a job has the other slot"


def test_no_more_tokens_than_the_cache_holds():
    room = LlmRoom(4, 1000)
    release = room.take(600)
    assert room.fits(400)
    assert not room.fits(401)
    release()
    assert (room.used, room.used_tokens) == (0, 0)
    assert room.fits(5000), "alone, so that the engine decides"


@pytest.mark.parametrize(("slots", "jobs"), [(1, 1), (2, 1), (16, 15)])
def test_jobs_leave_a_slot_for_requests(slots, jobs):
    assert job_slots(slots) == jobs
