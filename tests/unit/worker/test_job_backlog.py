"""Which jobs go next, by level, weight and order, and which may share a call."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from services.worker.domain.concurrency import job_calls, jobs_ahead
from services.worker.domain.job_backlog import JobBacklog, QueuedJob
from services.worker.domain.prefetch import job_prefetch
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import LEVELS, Level

pytestmark = pytest.mark.unit


def job_of(
    number: int, level: Level = "normal", key: bytes = b"k", rows: int = 1, attempt=0, flags=0
) -> QueuedJob:
    frame = envelope.request_frame(
        number.to_bytes(16, "big"), 2**62, rows, key, [], attempt=attempt, flags=flags
    )
    now = time.monotonic()
    return QueuedJob(envelope.read_request(frame), level, None, number, False, b"", now, now)


def numbers(group: list[QueuedJob]) -> list[int]:
    return [one.tag for one in group]


def test_jobs_of_one_level_go_in_order():
    backlog = JobBacklog()
    assert (backlog.take(8), len(backlog)) == ([], 0)
    for number in range(10):
        backlog.add(job_of(number))
    assert numbers(backlog.take(4)) == [0, 1, 2, 3]
    assert len(backlog) == 6
    assert numbers(backlog.take(0)) == [4]
    assert numbers(backlog.take(100)) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("rounds", [1, 3])
def test_levels_are_served_by_weight(rounds):
    backlog = JobBacklog()
    for number in range(100 * rounds):
        for level in LEVELS:
            backlog.add(job_of(number, level))
    served = Counter(backlog.take(0)[0].level for _ in range(21 * rounds))
    assert served == {"high": 16 * rounds, "normal": 4 * rounds, "low": rounds}


def test_an_idle_level_saves_nothing_up():
    backlog = JobBacklog()
    for number in range(1000):
        backlog.add(job_of(number, "high"))
        backlog.take(0)
    for number in range(100):
        backlog.add(job_of(number, "low"))
        backlog.add(job_of(number, "high"))
    served = Counter(backlog.take(0)[0].level for _ in range(40))
    assert served["high"] >= 36
    assert served["low"] >= 2


def test_one_job_of_a_level_in_hand_is_enough_for_its_weight():
    """Each job is replaced before the next one is taken, as with long jobs."""
    backlog = JobBacklog()
    for level in LEVELS:
        backlog.add(job_of(0, level))
    served: Counter[str] = Counter()
    for number in range(210):
        (one,) = backlog.take(0)
        served[one.level] += 1
        backlog.add(job_of(number, one.level))
    assert served == {"high": 160, "normal": 40, "low": 10}


def test_calls_are_filled_up_from_other_levels():
    backlog = JobBacklog()
    backlog.add(job_of(1, "low"))
    backlog.add(job_of(2, "high"))
    backlog.add(job_of(3, "normal", key=b"other"))
    assert numbers(backlog.take(8)) == [2, 1]
    assert numbers(backlog.take(8)) == [3]
    backlog.add(job_of(4, "high", rows=5))
    backlog.add(job_of(5, "low", rows=4))
    assert numbers(backlog.take(8)) == [4]


def test_jobs_that_are_called_alone():
    backlog = JobBacklog()
    for one in (
        job_of(0),
        job_of(1, rows=0),
        job_of(2, attempt=1),
        job_of(3, flags=envelope.CLAIM),
        job_of(4),
    ):
        backlog.add(one)
    assert [numbers(backlog.take(8)) for _ in range(4)] == [[0, 4], [1], [2], [3]]


def test_removing_jobs():
    backlog = JobBacklog()
    for number in range(6):
        backlog.add(job_of(number, LEVELS[number % 3]))
    assert sorted(numbers(backlog.remove(lambda one: one.tag % 2 == 0))) == [0, 2, 4]
    assert len(backlog) == 3
    assert sorted(tag for _ in range(3) for tag in numbers(backlog.take(0))) == [1, 3, 5]
    assert backlog.remove(lambda _: True) == []


def test_one_call_is_kept_for_requests():
    assert [job_calls(count) for count in (1, 2, 9)] == [1, 1, 8]


def test_only_short_calls_are_prepared_ahead():
    assert [jobs_ahead(2, ms) for ms in (None, 0.5, 99.0, 101.0)] == [0, 2, 2, 0]


def test_how_many_jobs_to_hold():
    def wanted(call_ms: float | None, mean: float | None = 1.0, calls: int = 1, batch: int = 0) -> int:
        return job_prefetch(call_ms=call_ms, batch_mean=mean, calls=calls, max_batch=batch)

    assert wanted(None) == 2
    assert wanted(600_000) == 2, "what waits behind a long one is lost to others"
    assert wanted(600_000, calls=3) == 4
    assert wanted(5_000, mean=4, calls=2, batch=8) == 24
    assert wanted(10) == 10
    assert wanted(0.1) == 256
    assert wanted(2.0, mean=None, batch=16) == 50
