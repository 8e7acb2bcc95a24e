"""The way of a job in the store: each step once, whoever asks, and however often."""

from __future__ import annotations

import asyncio
import time

import pytest

from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import MAX_ATTEMPTS, Finish, Idempotency, Take, Taken
from tidegate.kernel.store.transitions import JobWait

pytestmark = pytest.mark.integration


async def test_the_usual_way(store, way, new):
    fresh = new(ask={"id": "mine"}, metadata={"a": 1}, level="high", webhook="http://x/", batch="b1", line=7)
    assert await store.accept(fresh) == (fresh.id, True)
    job = await way.job(fresh.id)
    assert (job.state, job.status, job.attempt, job.queued_ms) == ("accepting", "queued", 0, 0)
    assert (job.ask, job.metadata, job.level) == ({"id": "mine"}, {"a": 1}, "high")
    assert (job.webhook, job.batch, job.line, job.version) == ("http://x/", "b1", 7, 1)
    await store.queued([fresh.id])
    assert (await way.job(fresh.id)).state == "queued"
    assert await store.request(fresh.id) == fresh.frame
    assert await way.take(fresh.id, "w7") == Taken("run", 1)
    job = await way.job(fresh.id)
    assert (job.state, job.worker, job.attempt, job.finished_ms) == ("running", "w7", 1, 0)
    assert await way.finish(fresh.id, 1, reply=b"reply", wait_us=5, compute_us=8)
    job = await way.job(fresh.id)
    assert (job.state, job.wait_us, job.compute_us, job.result_size) == ("succeeded", 5, 8, 5)
    assert job.created_ms <= job.queued_ms <= job.started_ms <= job.finished_ms <= time.time() * 1e3
    assert await store.result(fresh.id) == b"reply"
    assert await store.request(fresh.id) is None, "not needed any more"
    events = await store.log(fresh.id)
    assert [(e.seq, e.state, e.attempt, e.detail) for e in events] == [
        (1, "accepting", 0, ""),
        (2, "queued", 0, ""),
        (3, "running", 1, "w7"),
        (4, "succeeded", 1, ""),
    ]
    assert await store.log(fresh.id, 3) == events[3:]


async def test_a_job_that_is_taken_before_its_mark_was_queued_all_the_same(store, way, new):
    fresh = new()
    await store.accept(fresh)
    assert await way.take(fresh.id) == Taken("run", 1)
    assert await way.finish(fresh.id, 1, reply=b"reply")
    await store.queued([fresh.id])  # too late
    job = await way.job(fresh.id)
    assert 0 < job.queued_ms <= job.started_ms


async def test_what_there_is_not(store, way):
    assert await store.get(b"x" * 16) is None
    assert await store.get_many([b"x" * 16]) == [None]
    assert await store.get_many([]) == []
    assert await store.result(b"x" * 16) is None
    assert await store.cancel(b"x" * 16) is None
    assert await store.log(b"x" * 16) == []
    assert await way.take(b"x" * 16) == Taken("drop", 0)
    assert not await way.finish(b"x" * 16, 1)
    assert not await store.lease(b"x" * 16, 1, "w1", 1)
    assert await store.claim_republish(b"x" * 16, 0, "accepting") is None
    await store.queued([b"x" * 16])


@pytest.mark.parametrize("state", ["succeeded", "failed"])
async def test_the_first_terminal_state_wins(store, way, state):
    job = await way.running()
    assert await way.finish(job.id, 1, state)
    assert await way.finish(job.id, 1, state), "told again, as its answer may have been lost"
    assert not await way.finish(job.id, 1, "failed" if state == "succeeded" else "succeeded")
    assert not await way.finish(job.id, 2, state)
    assert (await store.cancel(job.id)).state == state
    assert await way.take(job.id, redelivered=True) == Taken("drop", 1)
    assert await store.expire(int(time.time() * 1e3) + 7_200_000, 10) == []
    assert (await way.job(job.id)).state == state
    assert [e.state for e in await store.log(job.id)][-2:] == ["running", state]
    assert (await store.counts()).ledger == {"accepted": 1, state: 1}


async def test_what_fails_keeps_its_request(store, way):
    job = await way.running()
    error = {"reason": "model_failed", "message": "no «luck»"}
    assert await way.finish(job.id, 1, "failed", error=error, reply=b"r")
    assert (await way.job(job.id)).error == error
    assert await store.request(job.id) is not None
    assert (await store.log(job.id))[-1].detail == "model_failed"


@pytest.mark.parametrize("safe", [True, False])
async def test_a_loss_during_a_wait_is_no_attempt(store, way, safe):
    job = await way.running(retry_safe=safe)
    for attempt in range(1, MAX_ATTEMPTS + 3):
        assert await store.waits([JobWait(job.id, attempt, True)]) == [True]
        found = await way.take(job.id, redelivered=True, alone=False)
        assert found == Taken("run", attempt + 1), "and it is no suspect"
    last = MAX_ATTEMPTS + 3
    assert await store.waits([JobWait(job.id, last, True), JobWait(job.id, last - 1, True)]) == [True, False]
    assert await store.waits([JobWait(job.id, last, False)]) == [True]
    if safe:
        for attempt in range(last + 1, last + MAX_ATTEMPTS):
            assert (await way.take(job.id, redelivered=True, alone=False)).outcome == "suspect"
            assert await way.take(job.id, redelivered=True) == Taken("run", attempt)
    assert (await way.take(job.id, redelivered=True)).outcome == "failed", "its model was called"
    reason = "attempts_exhausted" if safe else "worker_lost"
    assert (await way.job(job.id)).error["reason"] == reason


async def test_a_waiting_job_is_published_again_however_often_its_host_restarts(store, way):
    job = await way.running()
    for attempt in range(1, 300):
        assert await store.waits([JobWait(job.id, attempt, True)]) == [True]
        frame = await store.claim_republish(job.id, attempt, "running")
        assert frame is not None
        assert frame[28] == min(attempt, 255)
        assert await way.take(job.id, frame_attempt=frame[28]) == Taken("run", attempt + 1)


@pytest.mark.parametrize("steps", ["accept", "queued", "take"])
async def test_cancel(store, way, new, steps):
    fresh = new()
    await store.accept(fresh)
    if steps != "accept":
        await store.queued([fresh.id])
    if steps == "take":
        await way.take(fresh.id)
    assert (await store.cancel(fresh.id)).state == "cancelled"
    assert (await store.cancel(fresh.id)).state == "cancelled"
    assert (await way.take(fresh.id, redelivered=True)).outcome == "drop"
    assert not await way.finish(fresh.id, 1)
    await store.queued([fresh.id])
    assert (await way.job(fresh.id)).state == "cancelled"
    assert (await store.counts()).deployments == {}


async def test_taken_before_the_broker_confirmed(store, way, new):
    fresh = new()
    await store.accept(fresh)
    assert await way.take(fresh.id) == Taken("run", 1)
    await store.queued([fresh.id])
    assert (await way.job(fresh.id)).state == "running"
    assert await store.stale(int(time.time() * 1e3) + 60_000, 10) == []


async def test_a_duplicate_is_dropped_and_a_redelivery_is_taken_over(way):
    job = await way.running("w1")
    assert await way.take(job.id, "w2") == Taken("drop", 1), "a second message of the same job"
    assert await way.take(job.id, "w2", redelivered=True) == Taken("run", 2), "the first worker died"
    assert not await way.finish(job.id, 1), "the first worker lives after all, too late"
    assert await way.take(job.id, "w3", frame_attempt=1) == Taken("drop", 2)
    assert await way.take(job.id, "w3", frame_attempt=2) == Taken("run", 3), "somebody published it again"
    assert await way.take(job.id, "w4", redelivered=True) == Taken("failed", 3)
    job = await way.job(job.id)
    assert (job.state, job.error["reason"]) == ("failed", "attempts_exhausted")
    assert "3 attempts" in job.error["message"]


async def test_what_must_not_run_twice_fails_with_its_worker(way):
    job = await way.running(retry_safe=False)
    assert await way.take(job.id, "w2") == Taken("drop", 1)
    assert await way.take(job.id, "w2", redelivered=True) == Taken("failed", 1)
    assert (await way.job(job.id)).error["reason"] == "worker_lost"
    waits = await way.queued(retry_safe=False)
    assert await way.take(waits.id, redelivered=True) == Taken("run", 1), "its worker died before it ran"


async def test_a_wish_repeated_is_the_same_attempt(store, way):
    job = await way.queued()
    wish = Take(job.id, "w1", True, 0, token=b"token")
    assert [await store.take([wish]) for _ in range(3)] == [[Taken("run", 1)]] * 3
    again = wish._replace(lost=1)
    assert await store.take([again]) == [Taken("run", 2)], "its model server died under it"
    assert await store.take([again]) == [Taken("run", 2)]
    assert await store.take([wish._replace(lost=2)]) == [Taken("run", 3)]
    assert await store.take([wish._replace(lost=3)]) == [Taken("failed", 3)]


async def test_expiry(store, way):
    soon = int(time.time() * 1e3) + 60_000
    jobs = [await way.queued(expires_ms=soon), await way.running(expires_ms=soon), await way.queued()]
    late = await way.queued(expires_ms=1)
    assert await way.take(late.id) == Taken("expired", 0), "nobody had noticed yet"
    found = await store.expire(soon + 1, 10)
    assert {(job.id, job.state) for job in found} == {(job.id, "expired") for job in jobs[:2]}
    assert await store.expire(soon + 1, 10) == []
    assert not await way.finish(jobs[1].id, 1)
    assert (await store.counts()).ledger == {"accepted": 4, "expired": 3}


async def test_idempotency(store, other, new):
    key = Idempotency("order-7", b"a" * 32)
    first = new(idempotency=key)
    assert await store.accept(first) == (first.id, True)
    assert await store.accept(first) == (first.id, True), "the same call again, as its answer was lost"
    assert await other.accept(new(idempotency=key)) == (first.id, False)
    with pytest.raises(Conflict):
        await other.accept(new(idempotency=Idempotency("order-7", b"b" * 32)))
    theirs = new(idempotency=Idempotency("order-7", b"b" * 32), principal="somebody-else")
    assert await other.accept(theirs) == (theirs.id, True)
    at_once = [new(idempotency=Idempotency("order-8", b"a" * 32)) for _ in range(20)]
    found = await asyncio.gather(*((store, other)[n % 2].accept(job) for n, job in enumerate(at_once)))
    assert len({accepted.id for accepted in found}) == 1
    assert sum(accepted.fresh for accepted in found) == 1
    assert (await store.counts()).ledger == {"accepted": 3}


async def test_a_job_that_is_accepted_twice_in_one_call_is_one_job(store, new):
    known, fresh, late = new(), new(), new()
    await asyncio.gather(store.accept(known), store.accept(known))
    found = await asyncio.gather(*(store.accept(job) for job in (fresh, known, fresh, late)))
    assert found == [(job.id, True) for job in (fresh, known, fresh, late)]
    assert (await store.counts()).ledger == {"accepted": 3}
    for job in (known, fresh, late):
        assert [event.state for event in await store.log(job.id)] == ["accepting"]
        assert await store.request(job.id) == job.frame


async def test_many_race_and_each_job_ends_once(store, other, way, new):
    """Two workers, a canceller and an expirer all want the same jobs."""
    jobs = [new() for _ in range(200)]
    await asyncio.gather(*(store.accept(job) for job in jobs))
    await store.queued([job.id for job in jobs])

    async def work(by, name: str, redelivered: bool) -> None:
        for job in jobs:
            (taken,) = await by.take([Take(job.id, name, redelivered, 0, token=name.encode())])
            if taken.outcome == "run":
                await by.finish([Finish(job.id, taken.attempt, "succeeded", reply=name.encode())])

    async def cancel() -> None:
        for job in jobs[::3]:
            await other.cancel(job.id)

    await asyncio.gather(work(store, "w1", False), work(other, "w2", True), work(other, "w3", True), cancel())
    logs = [[e.state for e in await store.log(job.id)] for job in jobs]
    ends = [[state for state in log if state in {"succeeded", "cancelled", "failed"}] for log in logs]
    assert all(len(end) == 1 for end in ends)
    counts = await store.counts()
    assert counts.unfinished == 0
    assert counts.ledger["accepted"] == sum(counts.states.values()) == 200
    assert sum(counts.ledger.get(state, 0) for state in ("succeeded", "cancelled", "failed")) == 200


async def test_the_frame_of_a_republished_job_says_its_attempt(store, way):
    job = await way.running()
    frame = await store.claim_republish(job.id, 1, "running")
    assert frame is not None
    request = envelope.read_request(frame)
    assert (request.id, request.attempt, request.data) == (job.id, 1, [b"data"])


async def test_a_job_that_was_lost_is_taken_alone(store, way):
    """Beside others it is only named a suspect: nothing changes, and no attempt is counted."""
    job = await way.running()
    for _ in range(3):
        assert await way.take(job.id, "w2", redelivered=True, alone=False) == ("suspect", 1)
    assert (await way.job(job.id)).attempt == 1
    assert await way.take(job.id, "w2", redelivered=True, alone=True) == ("run", 2)


async def test_a_first_attempt_needs_not_be_alone(store, way):
    job = await way.queued()
    assert await way.take(job.id, redelivered=True, alone=False) == ("run", 1)


async def test_what_may_not_run_twice_fails_in_company_too(store, way):
    job = await way.running(retry_safe=False)
    assert (await way.take(job.id, "w2", redelivered=True, alone=False)).outcome == "failed"
