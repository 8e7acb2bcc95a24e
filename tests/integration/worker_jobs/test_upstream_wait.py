"""Jobs whose upstream is away wait for it, up to a stated time."""

from __future__ import annotations

import pytest

from services.worker.application import job_leases
from services.worker.domain import llm_answers
from tests.integration.worker_jobs.conftest import Doubler
from tests.integration.worker_jobs.test_llm_jobs import Talker, submit  # noqa: F401 - a fixture
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.jobs import MAX_ATTEMPTS
from tidegate.kernel.store.jobs import RECORD

pytestmark = pytest.mark.integration

AWAY = "Failed to process the request(s) for model instance 'm_0', message: UpstreamUnavailable: it is away"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_answers, "PAUSES_S", (0.02, 0.05))


@pytest.fixture
def waits(gateway):
    """Return ``await waits(id_, attempt)``: True if the record says that this attempt waits."""

    async def read(id_: bytes, attempt: int) -> bool:
        found = await gateway.store._redis.hmget(RECORD.encode() + id_, "waits", "attempt")
        return [int(value or 0) for value in found] == [attempt, attempt]

    return read


def away(times: int):
    """Return a model's failure that happens so many times."""
    left = [times]

    def fail(_) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise ModelFailed(AWAY)

    return fail


async def test_jobs_are_done_when_the_upstream_returns(start, gateway, until, nothing_is_left):
    worker = await start(upstream_wait_s=600)
    worker.model.fail = away(5)
    ids = [await gateway.submit(n) for n in range(3)]
    await until(lambda: gateway.is_in("succeeded", *ids))
    assert [await gateway.result(id_) for id_ in ids] == [[0.0], [2.0], [4.0]]
    assert {(await gateway.job(id_)).attempt for id_ in ids} == {1}, "a wait is no attempt"
    assert len(worker.model.calls) > 5
    await nothing_is_left(worker)


async def test_a_worker_that_stops_does_not_wait_for_the_upstream(start, gateway, until, monkeypatch):
    """One job waits, and another one is behind it. Neither keeps the worker. Jobs that run do."""
    monkeypatch.setattr(llm_answers, "PAUSES_S", (200.0, 200.0))
    monkeypatch.setattr(job_leases, "CHECK_S", 600.0)  # a lease would take the message
    worker = await start(upstream_wait_s=600, max_rows=0, max_concurrency=1)
    assert not worker.serving.busy
    worker.model.fail = away(1)
    ids = [await gateway.submit(n) for n in range(5)]
    await until(lambda: sorted(job.waits for job in worker.jobs.by_id.values())[-2:] == [False, True])
    assert not worker.serving.busy
    await worker.stop()
    closed = Doubler()  # before it starts: the jobs wait in the queue
    closed.open.clear()
    last = await start(upstream_wait_s=600, model=closed)
    await until(lambda: last.serving.busy)
    last.model.open.set()
    await until(lambda: gateway.is_in("succeeded", *ids))
    assert {(await gateway.job(id_)).attempt for id_ in ids} <= {1, 2}


async def test_without_the_setting_and_after_the_time_a_job_fails(start, gateway, until):
    worker = await start()
    worker.model.fail = away(1000)
    first = await gateway.submit(1)
    await until(lambda: gateway.is_in("failed", first))
    assert len(worker.model.calls) == 1
    assert (await gateway.job(first)).error["reason"] == "upstream_unavailable"
    await worker.stop()
    patient = await start(upstream_wait_s=0.3)
    patient.model.fail = away(1000)
    second = await gateway.submit(1)
    await until(lambda: gateway.is_in("failed", second))
    assert len(patient.model.calls) > 1


async def test_a_restart_during_a_wait_is_no_attempt(start, gateway, until, waits, monkeypatch):
    """More restarts than attempts, with an upstream that is away all the time."""
    monkeypatch.setattr(llm_answers, "PAUSES_S", (200.0, 200.0))
    monkeypatch.setattr(job_leases, "CHECK_S", 600.0)
    id_ = await gateway.submit(1)
    for restart in range(1, MAX_ATTEMPTS + 3):
        model = Doubler()
        model.fail = away(1000)
        worker = await start(upstream_wait_s=600, model=model)
        await until(lambda restart=restart: waits(id_, restart))
        await worker.die()
    last = await start(upstream_wait_s=600)
    await until(lambda: gateway.is_in("succeeded", id_))
    assert await gateway.result(id_) == [2.0]
    assert len(last.model.calls) == 1


async def test_a_language_models_job_may_be_lost_often_while_it_waits(
    start,
    gateway,
    submit,  # noqa: F811
    until,
    waits,
    monkeypatch,
    nothing_is_left,
):
    monkeypatch.setattr(llm_answers, "PAUSES_S", (200.0, 200.0))
    monkeypatch.setattr(job_leases, "CHECK_S", 600.0)
    id_ = await submit("a prompt")
    for restart in range(1, MAX_ATTEMPTS + 3):
        model = Talker()
        model.refusals = [{"status": 502}]
        worker = await start(max_rows=0, streams=4, model=model, upstream_wait_s=600)
        await until(lambda restart=restart: waits(id_, restart))
        await worker.die()
    last = await start(max_rows=0, streams=4, model=Talker(), upstream_wait_s=600)
    await until(lambda: gateway.is_in("succeeded", id_))
    await nothing_is_left(last)


async def test_a_waiting_job_is_leased_so_that_restarts_are_no_deliveries(start, gateway, until, monkeypatch):
    monkeypatch.setattr(llm_answers, "PAUSES_S", (200.0, 200.0))
    monkeypatch.setattr(job_leases, "CHECK_S", 0.05)
    worker = await start(upstream_wait_s=600)
    worker.model.fail = away(1000)
    id_ = await gateway.submit(1)
    await until(lambda: worker.jobs.by_id and worker.messages.unsettled == 0)
    assert worker.jobs.by_id[id_].leased_at is not None


async def test_a_waiting_job_can_be_cancelled(start, gateway, until, nothing_is_left):
    worker = await start(upstream_wait_s=600)
    worker.model.fail = away(1000)
    id_ = await gateway.submit(1)
    await until(lambda: len(worker.model.calls) > 1)
    await gateway.store.cancel(id_)
    await gateway.cancel(id_)
    await until(lambda: gateway.is_in("cancelled", id_))
    await nothing_is_left(worker)


async def test_a_language_models_job_waits_too(start, gateway, submit, until, nothing_is_left):  # noqa: F811
    worker = await start(max_rows=0, streams=4, model=Talker(), upstream_wait_s=600)
    worker.model.refusals = [{"status": 502}, {"status": 504}, {"status": 502}]
    id_ = await submit("a prompt")
    await until(lambda: gateway.is_in("succeeded", id_))
    assert (await gateway.job(id_)).attempt == 1
    await worker.stop()
    hasty = await start(max_rows=0, streams=4, model=Talker())
    hasty.model.refusals = [{"status": 502}]
    other = await submit("a prompt")
    await until(lambda: gateway.is_in("failed", other))
