"""Test recorded arrivals and rounds on a real SQLite file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from services.autoscaler.adapters.history.recordings import MINUTES_KEPT_S, SECONDS_KEPT_S, Recordings

NAME = "digits-v1"
AT = 1_700_000_000


@pytest.fixture
def history(tmp_path: Path):
    found = Recordings(tmp_path / "data" / "history.db", 2**20)
    yield found
    found.close()


def test_arrivals_add_up_by_second_and_by_minute(history: Recordings):
    history.add_arrivals({(NAME, AT): 3, (NAME, AT + 1): 2, (NAME, AT + 200): 5, ("other-v1", AT): 9})
    history.add_arrivals({(NAME, AT): 1})
    assert history.by_second(NAME, AT - 10, AT + 300) == {AT: 4, AT + 1: 2, AT + 200: 5}
    assert history.by_second(NAME, AT + 1, AT + 200) == {AT + 1: 2}
    minutes = history.by_minute(NAME, AT - 60, AT + 300)
    assert minutes == {AT // 60: 6, (AT + 200) // 60: 5}
    assert history.first_second(NAME) == AT // 3600 * 3600
    assert history.first_second("nothing") is None


def test_old_arrivals_go_by_second_first(history: Recordings):
    history.add_arrivals({(NAME, AT): 3, (NAME, AT + SECONDS_KEPT_S + 60): 1})
    history.retire(AT + SECONDS_KEPT_S + 120)
    assert AT not in history.by_second(NAME, AT - 60, AT + 60)
    assert history.by_minute(NAME, AT - 60, AT + 60) == {AT // 60: 3}
    history.retire(AT + MINUTES_KEPT_S + 7200)
    assert history.by_minute(NAME, AT - 60, AT + 60) == {}


def chunk(number: int, *, whole: bool, size: int = 10) -> dict:
    noise = random.Random(number).randbytes(size).hex()  # which no compression makes small
    return {"policy": {}, "state": {} if whole else None, "rounds": [], "noise": noise, "number": number}


def test_chunks_are_read_from_one_on_that_stands_by_itself(history: Recordings):
    for number in range(9):
        history.add_chunk(AT + 10 * number, AT + 10 * number + 9, chunk(number, whole=number % 3 == 0))
    assert history.span() == (AT, AT + 89)

    def numbers(since: int, until: int) -> list[int]:
        return [found["number"] for found in history.chunks(AT + since, AT + until)]

    assert numbers(0, 100) == list(range(9))
    assert numbers(45, 52) == [3, 4, 5]
    assert numbers(-100, 5) == [0]
    assert numbers(-100, -50) == []


def test_the_oldest_chunks_go_when_there_is_no_room(history: Recordings):
    for number in range(70):
        history.add_chunk(AT + number, AT + number, chunk(number, whole=number % 10 == 0, size=60_000))
    found = [each["number"] for each in history.chunks(AT, AT + 100)]
    assert found
    assert found[0] > 0
    assert found[0] % 10 == 0
    assert found[-1] == 69


def test_only_its_owner_may_read_it(history: Recordings):
    assert history.path.stat().st_mode & 0o077 == 0
