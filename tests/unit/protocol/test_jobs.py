"""Jobs as values: ids, what the outside sees, and places in a line."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.kernel.protocol.jobs import (
    STATES,
    TERMINAL,
    Counts,
    Job,
    JobEvent,
    ahead,
    iso,
    new_id,
    read_id,
)

pytestmark = pytest.mark.unit

NOON = 1_700_000_000_123


def job(**given) -> Job:
    facts: dict[str, Any] = {
        "id": new_id(NOON, b"\1" * 10),
        "state": "queued",
        "attempt": 0,
        "model": "digits",
        "endpoint": "digits",
        "deployment": "digits-v1",
        "version": 1,
        "principal": "anonymous",
        "level": "normal",
        "created_ms": NOON,
        "expires_ms": NOON + 1000,
    }
    return Job(**(facts | given))


def test_ids_sort_by_creation():
    ids = [new_id(NOON + n, bytes([255 - n] * 10)) for n in range(5)]
    assert ids == sorted(ids)
    assert [len(id_) for id_ in ids] == [16] * 5
    assert [read_id(id_.hex()) for id_ in ids] == ids


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "A" * 32, "g" * 32, "0" * 30 + " 1", "٠" * 32])
def test_what_is_no_id(text):
    assert read_id(text) is None


def test_an_id_wants_its_random_bits():
    with pytest.raises(ValueError, match="10 random bytes"):
        new_id(NOON, b"short")


def test_what_the_outside_sees():
    shown = job(state="accepting", ask={"secret": "of the gateway"}).public()
    assert (shown["id"], shown["status"], shown["created_at"]) == (
        "018bcfe5687b01010101010101010101",
        "queued",
        "2023-11-14T22:13:20.123Z",
    )
    assert (shown["started_at"], shown["timing"], shown["worker"]) == (None, {}, None)
    assert "ask" not in shown
    over = job(
        state="succeeded",
        attempt=2,
        started_ms=NOON + 40,
        finished_ms=NOON + 90,
        wait_us=1500,
        compute_us=44_000,
        worker="digits-v1-0-1",
    ).public()
    assert over["timing"] == {
        "queue_ms": 40.0,
        "worker_wait_ms": 1.5,
        "compute_ms": 44.0,
        "total_ms": 90.0,
    }
    assert (over["attempts"], over["worker"]) == (2, "digits-v1-0-1")


def test_states():
    assert [state for state in STATES if not job(state=state).terminal] == ["accepting", "queued", "running"]
    assert len(TERMINAL) == 4


def test_events():
    assert JobEvent(1, NOON, "accepting", 0).public() == {
        "status": "queued",
        "at": iso(NOON),
        "attempt": 0,
    }
    assert JobEvent(3, NOON, "running", 1, "w1").public()["worker"] == "w1"
    assert JobEvent(4, NOON, "failed", 1, "worker_lost").public()["reason"] == "worker_lost"


@pytest.mark.parametrize(
    ("rank", "level", "waiting", "found"),
    [
        (0, "low", {"high": 1000, "normal": 1000, "low": 1}, 0),
        (1, "low", {"high": 1000, "normal": 1000, "low": 2}, 21),
        (10, "low", {"high": 3, "normal": 0, "low": 11}, 13),
        (16, "high", {"high": 17, "normal": 100, "low": 100}, 21),
        (8, "normal", {"high": 8, "normal": 9}, 16),
    ],
)
def test_how_many_are_ahead(rank, level, waiting, found):
    assert ahead(rank, level, waiting) == found


def test_counts():
    states = dict.fromkeys(STATES, 0) | {"queued": 2, "running": 1, "failed": 7}
    assert Counts(states, {}, {}, {}).unfinished == 3
