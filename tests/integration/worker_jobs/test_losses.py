"""Workers, channels, stores and model servers are lost: each job still ends in exactly one record."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from services.worker.api import jobs as consumer_module
from services.worker.application import job_leases as leases_module
from services.worker.application import job_scheduler as jobs_module
from tests.conftest import PATIENCE_S
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import EXCEPTIONS, jobs_queue
from tidegate.kernel.errors import BadRequest, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import MAX_ATTEMPTS, Taken
from tidegate.kernel.store import JobStore, StoreUnavailable
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import jobs_running

pytestmark = pytest.mark.integration


async def log_of(gateway, id_) -> list[tuple[str, int]]:
    """Return the states and attempts since it was first taken, which may be before it was ``queued``."""
    events = await gateway.store.log(id_)
    return [(event.state, event.attempt) for event in events if event.state not in {"accepting", "queued"}]


async def test_a_worker_dies(start, gateway, until, nothing_is_left):
    first = await start()
    first.model.open.clear()
    ids = [await gateway.submit(float(n), 0.0) for n in range(6)]
    await until(lambda: gateway.is_in("running", ids[0]))
    await first.die()
    second = await start()
    await until(lambda: gateway.is_in("succeeded", *ids))
    jobs = [await gateway.job(id_) for id_ in ids]
    assert {job.worker for job in jobs} != {None}
    assert jobs[0].attempt == 2
    assert await log_of(gateway, ids[0]) == [("running", 1), ("running", 2), ("succeeded", 2)]
    assert [await gateway.result(id_) for id_ in ids] == [[2.0 * n, 0.0] for n in range(6)]
    await nothing_is_left(second)


async def test_a_job_that_kills_its_workers(start, gateway, rabbitmq_url, until, nothing_is_left):
    """The job fails, and the router gets its message, to keep it as a dead letter."""
    id_ = await gateway.submit()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        worker = await start(serving=False)
        worker.model.open.clear()
        worker.scheduler.use(worker.model)

        async def runs(attempt=attempt) -> bool:
            job = await gateway.job(id_)
            return (job.state, job.attempt) == ("running", attempt)

        await until(runs)
        await worker.die()
    last = await start()
    await until(lambda: gateway.is_in("failed", id_))
    assert (await gateway.job(id_)).error["reason"] == "attempts_exhausted"
    got: list = []

    async def setup(channel) -> None:
        async def on_delivery(delivery) -> None:
            got.append(delivery)
            channel.ack(delivery.tag)

        await channel.declare(EXCEPTIONS)
        await channel.consume(EXCEPTIONS, on_delivery, prefetch=100)

    queue = jobs_queue(gateway.deployment, "normal").name
    async with Connection(rabbitmq_url, "letters", setup):
        await until(lambda: any(letter.headers.get("queue") == queue for letter in got))
    (letter,) = [each for each in got if each.headers.get("queue") == queue]
    assert letter.headers["cause"] == "attempts_exhausted"
    assert letter.body == envelope.pack(envelope.REQUESTS, [await gateway.store.request(id_)])
    await nothing_is_left(last)
    assert last.model.calls == []


async def test_64_jobs_and_one_that_kills(start, gateway, until, nothing_is_left):
    """With four calls at once, all jobs beside the killer succeed, and only the killer fails."""
    ids = [await gateway.submit(float(n), 0.0) for n in range(64)]
    killer, deaths = ids[5], 0
    while deaths < 10:
        worker = await start(serving=False, instances=4, max_rows=2, call_ms=0.1)
        await until(lambda worker=worker: killer in worker.jobs.by_id)
        original, killing = worker.model.call, asyncio.Event()

        async def call(requests, timeout_s, told, worker=worker, original=original, killing=killing):
            if any(request.id == killer for request in requests):
                worker.model.open.clear()
                killing.set()
            return await original(requests, timeout_s, told)

        worker.model.call = call
        worker.scheduler.use(worker.model)

        async def killed_or_over(killing=killing) -> bool:
            return killing.is_set() or (await gateway.job(killer)).terminal

        await until(killed_or_over)
        if not killing.is_set():
            break
        deaths += 1
        await worker.die()
    others = [id_ for id_ in ids if id_ != killer]
    await until(lambda: gateway.is_in("succeeded", *others))
    assert deaths == MAX_ATTEMPTS
    job = await gateway.job(killer)
    assert (job.state, job.error["reason"]) == ("failed", "attempts_exhausted")
    assert [await gateway.result(id_) for id_ in others] == [[2.0 * ids.index(id_), 0.0] for id_ in others]
    await nothing_is_left(worker)


async def test_a_job_that_was_lost_runs_with_nothing_beside_it(start, gateway, until, nothing_is_left):
    first = await start(max_rows=0)
    first.model.open.clear()
    lost = await gateway.submit()
    await until(lambda: gateway.is_in("running", lost))
    await first.die()
    second = await start(max_rows=0, instances=4, serving=False)
    second.model.open.clear()
    second.scheduler.use(second.model)
    await until(lambda: second.model.calls == [[lost]])
    fresh = await gateway.submit()
    await until(lambda: fresh in second.jobs.by_id)
    await asyncio.sleep(0.05)
    assert second.model.calls == [[lost]]
    second.model.open.set()
    await until(lambda: gateway.is_in("succeeded", lost, fresh))
    await nothing_is_left(second)


async def test_a_job_that_must_not_run_twice_fails(start, gateway, until, nothing_is_left):
    first = await start(max_rows=0)
    first.model.open.clear()
    runs, waits = await gateway.submit(retry_safe=False), await gateway.submit(retry_safe=False)
    await until(lambda: gateway.is_in("running", runs))
    await first.die()
    second = await start(max_rows=0)
    await until(lambda: gateway.is_in("failed", runs))
    await until(lambda: gateway.is_in("succeeded", waits))
    assert (await gateway.job(runs)).error["reason"] == "worker_lost"
    assert second.model.calls == [[waits]]
    await nothing_is_left(second)


async def test_the_model_server_dies_and_comes_back(start, gateway, until, monkeypatch, nothing_is_left):
    monkeypatch.setattr(jobs_module, "RETRY_S", 0.01)
    worker = await start(serving=False)
    ids = [await gateway.submit(float(n), 0.0) for n in range(3)]
    await until(lambda: len(worker.jobs.by_id) == 3)
    dies = [True]

    def fail(requests) -> None:
        if dies:
            dies.clear()
            worker.scheduler.use(None)
            raise Unavailable("Triton has gone")

    worker.model.fail = fail
    worker.scheduler.use(worker.model)
    await until(lambda: not dies)
    assert await gateway.is_in("running", *ids)
    worker.scheduler.use(worker.model)
    await until(lambda: gateway.is_in("succeeded", *ids))
    assert worker.model.calls[0] == ids
    assert sorted(worker.model.calls[1:]) == sorted([id_] for id_ in ids), "none takes a neighbour with it"
    assert worker.model.parameters_seen[-1]["tidegate_jobs"].endswith(":2:1")
    assert await log_of(gateway, ids[0]) == [("running", 1), ("running", 2), ("succeeded", 2)]
    await nothing_is_left(worker)


async def test_the_neighbours_of_a_bad_job_that_killed_the_model_server(
    start, gateway, until, monkeypatch, nothing_is_left
):
    monkeypatch.setattr(jobs_module, "RETRY_S", 0.01)
    worker = await start(serving=False)
    ids = [await gateway.submit(float(n), 0.0) for n in range(3)]
    await until(lambda: len(worker.jobs.by_id) == 3)

    def fail(requests) -> None:
        if len(requests) > 1:
            raise BadRequest("no")
        worker.model.fail = lambda _: None
        worker.scheduler.use(None)
        raise Unavailable("Triton has gone")

    worker.model.fail = fail
    worker.scheduler.use(worker.model)
    await until(lambda: len(worker.model.calls) == 2)
    worker.scheduler.use(worker.model)
    await until(lambda: gateway.is_in("succeeded", *ids))
    assert worker.model.calls[:2] == [ids, [ids[0]]]
    assert [(await gateway.job(id_)).attempt for id_ in ids] == [2, 1, 1]
    await nothing_is_left(worker)


async def test_a_job_that_kills_the_model_server(start, gateway, until, monkeypatch, nothing_is_left):
    monkeypatch.setattr(jobs_module, "RETRY_S", 0.01)
    worker = await start()

    def fail(requests) -> None:
        raise Unavailable("Triton has gone")

    worker.model.fail = fail
    safe, never = await gateway.submit(), await gateway.submit(retry_safe=False, level="low")
    await until(lambda: gateway.is_in("failed", safe, never))
    assert (await gateway.job(safe)).error["reason"] == "attempts_exhausted"
    assert (await gateway.job(never)).error["reason"] == "worker_lost"
    assert len([call for call in worker.model.calls if safe in call]) == MAX_ATTEMPTS
    assert len([call for call in worker.model.calls if never in call]) == 1
    await nothing_is_left(worker)


async def test_a_job_that_outlives_its_message(start, gateway, until, nothing_is_left):
    worker = await start(max_rows=0, ack_timeout_s=0.4)
    worker.model.open.clear()
    id_ = await gateway.submit()
    await until(lambda: gateway.is_in("running", id_))
    await until(lambda: worker.messages.unsettled == 0, "its message is acked")
    job = await gateway.job(id_)
    assert job.state == "running"
    assert 20_000 < job.lease_ms - time.time() * 1e3 <= 30_000
    assert set(worker.jobs.by_id) == {id_}
    worker.model.open.set()
    await until(lambda: gateway.is_in("succeeded", id_))
    assert await log_of(gateway, id_) == [("running", 1), ("succeeded", 1)]
    await nothing_is_left(worker)


async def test_a_lease_is_renewed_and_released(start, gateway, until, monkeypatch):
    monkeypatch.setattr(leases_module, "RENEW_S", 0.1)
    worker = await start(max_rows=0, ack_timeout_s=0.2)
    worker.model.open.clear()
    id_ = await gateway.submit()

    async def leased(above: int) -> int:
        lease_ms = (await gateway.job(id_)).lease_ms
        return lease_ms if lease_ms > above else 0

    first = await until(lambda: leased(0))
    await until(lambda: leased(first))
    await worker.stop()
    job = await gateway.job(id_)
    assert job.lease_ms <= time.time() * 1e3, "an orderly end waits for nothing"
    frame = await gateway.store.claim_republish(id_, 1, "running")
    second = await start(max_rows=0)
    await gateway.publish(gateway.new(), frame)
    await until(lambda: gateway.is_in("succeeded", id_))
    assert (await gateway.job(id_)).attempt == 2
    assert second.model.parameters_seen == [{"tidegate_jobs": f"{id_.hex()}:2:1"}]


async def test_a_lost_lease_ends_the_job_here(start, gateway, until, monkeypatch, nothing_is_left):
    """The record belongs to another worker, so this one drops the job."""
    monkeypatch.setattr(leases_module, "RENEW_S", 0.1)
    worker = await start(max_rows=0, ack_timeout_s=0.2)
    worker.model.open.clear()
    id_ = await gateway.submit()
    await until(lambda: worker.jobs.by_id and worker.messages.unsettled == 0)
    await gateway.store.cancel(id_)
    await until(lambda: worker.model.cancelled == 1, "although nobody told it")
    await nothing_is_left(worker)


async def test_a_lost_cancel_message_is_found_in_the_record(
    start, gateway, until, monkeypatch, nothing_is_left
):
    monkeypatch.setattr(leases_module, "RENEW_S", 0.1)
    monkeypatch.setattr(leases_module, "CHECK_S", 0.05)
    worker = await start(max_rows=0)
    worker.model.open.clear()
    id_ = await gateway.submit()
    await until(lambda: worker.model.calls == [[id_]])
    await gateway.store.cancel(id_)
    await until(lambda: worker.model.cancelled == 1)
    await nothing_is_left(worker)


async def test_a_job_outlives_its_channel(start, gateway, line, until, nothing_is_left):
    """The job runs on. Its message is delivered again, here or elsewhere, and acked at the job's end."""
    worker = await start(max_rows=0, url=line.url)
    worker.model.open.clear()
    id_, other = await gateway.submit(), await gateway.submit(level="low")
    await until(lambda: worker.model.calls == [[id_]])
    before = worker.messages.connection.channel
    line.cut()
    await until(
        lambda: worker.messages.connection.channel not in (None, before) and other in worker.jobs.by_id
    )
    worker.model.open.set()
    await until(lambda: gateway.is_in("succeeded", id_, other))
    assert sorted(worker.model.calls) == sorted([[id_], [other]]), "neither ran twice"
    assert (await gateway.job(id_)).attempt == 1
    await nothing_is_left(worker)


async def test_the_channel_is_lost_and_another_worker_gets_the_message(
    start, gateway, line, until, monkeypatch, nothing_is_left
):
    monkeypatch.setattr(leases_module, "CHECK_S", 0.02)
    first = await start(max_rows=0, url=line.url)
    first.model.open.clear()
    id_ = await gateway.submit(retry_safe=False)
    await until(lambda: first.model.calls == [[id_]])
    await line.down()

    async def leased() -> bool:
        return (await gateway.job(id_)).lease_ms > 0

    await until(leased)
    second = await start(max_rows=0)
    await nothing_is_left(second)
    assert second.model.calls == []
    first.model.open.set()
    await until(lambda: gateway.is_in("succeeded", id_))
    assert (await gateway.job(id_)).attempt == 1


async def test_jobs_wait_for_the_store(start, gateway, until, tmp_path, monkeypatch):
    """Ends are recorded once the store is back; other jobs wait. No job is lost or runs twice."""
    monkeypatch.setattr(jobs_module, "RETRY_S", 0.05)
    (port,) = free_ports(1)
    with jobs_running(tmp_path / "jobs", port=port) as url:
        gateway.store = JobStore.connect(url)
        worker = await start(max_rows=0, store_url=url)
        worker.model.open.clear()
        ids = [await gateway.submit(float(n), 0.0) for n in range(4)]
        await until(lambda: worker.model.calls == [[ids[0]]])
    worker.model.open.set()
    await until(lambda: worker.jobs.open_calls == 0)
    await asyncio.sleep(0.2)
    assert worker.model.calls == [[ids[0]]]
    assert worker.messages.unsettled > 0, "not acked before it is recorded"
    with jobs_running(tmp_path / "jobs", port=port):
        await until(lambda: gateway.is_in("succeeded", *ids))
        assert sorted(worker.model.calls) == sorted([id_] for id_ in ids)
        await until(lambda: worker.messages.unsettled == 0)
        for id_ in ids:
            assert await log_of(gateway, id_) == [("running", 1), ("succeeded", 1)]
        await worker.stop()
        await gateway.store.close()


async def test_a_lease_is_renewed_while_the_result_waits(
    start, gateway, until, claims, monkeypatch, nothing_is_left
):
    """Its end cannot be recorded while the blob store is away, so the job stays with this worker."""
    monkeypatch.setattr(leases_module, "RENEW_S", 0.1)
    away = [True]
    give = claims.give

    async def given(*data, **how):
        if away:
            raise Unavailable("the blob store is away")
        return await give(*data, **how)

    monkeypatch.setattr(claims, "give", given)
    worker = await start(max_rows=0, ack_timeout_s=0.2)
    id_ = await gateway.submit(*[1.0] * 100_000, retry_safe=False, batched=False)
    await until(lambda: worker.model.calls == [[id_]] and worker.jobs.open_calls == 0)

    async def leased(above: int) -> int:
        lease_ms = (await gateway.job(id_)).lease_ms
        return lease_ms if lease_ms > above else 0

    first = await until(lambda: leased(0))
    await until(lambda: worker.messages.unsettled == 0)
    await until(lambda: leased(first))
    away.clear()
    await until(lambda: gateway.is_in("succeeded", id_))
    assert (await gateway.job(id_)).attempt == 1
    await nothing_is_left(worker)


@pytest.mark.parametrize("call", ["take", "finish"])
async def test_an_unexpected_error_is_another_attempt(
    start, gateway, until, monkeypatch, caplog, nothing_is_left, call
):
    """After a bug while jobs are taken or recorded, their messages are delivered again."""
    monkeypatch.setattr(jobs_module, "RETRY_S", 0.01)
    worker = await start(max_rows=0)
    works, broken = getattr(worker.jobs._records._store, call), [True]

    async def breaks_once(*args):
        if broken:
            broken.clear()
            raise ZeroDivisionError("a mistake")
        return await works(*args)

    monkeypatch.setattr(worker.jobs._records._store, call, breaks_once)
    id_ = await gateway.submit()
    await until(lambda: gateway.is_in("succeeded", id_))
    assert (await gateway.job(id_)).attempt == {"take": 1, "finish": 2}[call]
    assert [r.exc_info[0] for r in caplog.records if r.exc_info] == [ZeroDivisionError]
    await nothing_is_left(worker)


class Deaf:
    """A store that takes a job, but whose answer to the next ``take`` is lost."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.deaf = False
        self.missed: list[list[Taken]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def take(self, claims):
        found = await self._store.take(claims)
        if self.deaf:
            self.missed.append(found)
            raise StoreUnavailable("the answer was lost")
        return found


async def test_a_job_stays_if_the_stores_answer_is_lost(start, gateway, until, monkeypatch, nothing_is_left):
    """The record may say ``running`` here. After a nack, the next worker would count a lost attempt."""
    monkeypatch.setattr(jobs_module, "RETRY_S", 0.01)
    monkeypatch.setattr(consumer_module, "MAX_WAIT_S", 0.05)
    monkeypatch.setattr(consumer_module, "RETUNE_S", 0.02)
    worker = await start(max_rows=0, serving=False)
    store = worker.jobs._records._store = Deaf(worker.jobs._records._store)
    store.deaf = True
    worker.scheduler.use(worker.model)
    id_ = await gateway.submit(retry_safe=False)
    await until(lambda: len(store.missed) > 2)
    await asyncio.sleep(0.2)
    store.deaf = False
    await until(lambda: gateway.is_in("succeeded", id_))
    assert await log_of(gateway, id_) == [("running", 1), ("succeeded", 1)]
    await nothing_is_left(worker)


async def test_the_stores_answer_is_lost_after_the_model_server(
    start, gateway, until, monkeypatch, nothing_is_left
):
    """The record is an attempt ahead of this worker, but the job is still this worker's."""
    monkeypatch.setattr(jobs_module, "RETRY_S", 0.01)
    monkeypatch.setattr(leases_module, "RENEW_S", 0.0)
    monkeypatch.setattr(leases_module, "CHECK_S", 0.01)
    worker = await start(max_rows=0)
    store = worker.jobs._records._store = Deaf(worker.jobs._records._store)

    def fail(requests) -> None:
        store.deaf = True
        worker.model.fail = lambda _: None
        raise Unavailable("Triton has gone")

    worker.model.fail = fail
    id_ = await gateway.submit()
    await until(lambda: len(store.missed) > 5)
    assert set(worker.jobs.by_id) == {id_}
    store.deaf = False
    await until(lambda: gateway.is_in("succeeded", id_))
    assert await log_of(gateway, id_) == [("running", 1), ("running", 2), ("succeeded", 2)]
    await nothing_is_left(worker)


async def test_closed_while_its_consumers_start(start, gateway, line, hold_up):
    """A new channel is being set up when the worker is closed."""
    worker = await start(url=line.url)
    consuming = hold_up("jobs.v1.")
    line.cut()
    await consuming.begun.wait()
    closing = asyncio.create_task(worker.messages.close())
    await asyncio.sleep(0)
    consuming.go.set()
    await closing
    await worker.messages.connection.wait_up(PATIENCE_S)
    await gateway.submit()
    await asyncio.sleep(0.1)
    assert worker.model.calls == []
    assert await gateway.waiting() == 1
