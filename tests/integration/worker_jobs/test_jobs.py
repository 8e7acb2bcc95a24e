"""Jobs at a worker run once, are recorded before their messages are acked, and leave room for requests."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from dataclasses import replace

import pytest
from prometheus_client import REGISTRY

from services.gateway.adapters.store.job_usage import JobUsageStore
from services.worker.api import jobs as consumer_module
from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from tests.conftest import PATIENCE_S
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import EXCEPTIONS, jobs_queue
from tidegate.kernel.errors import ModelFailed, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.usage import COUNTS

pytestmark = pytest.mark.integration


async def test_a_job_from_message_to_record(start, gateway, until, nothing_is_left):
    worker = await start()
    id_ = await gateway.submit(1.5, 2.0)
    await until(lambda: gateway.is_in("succeeded", id_))
    job = await gateway.job(id_)
    assert (job.attempt, job.error) == (1, None)
    assert job.wait_us >= 0 < job.compute_us
    assert await gateway.result(id_) == [3.0, 4.0]
    assert worker.model.parameters_seen == [{"tidegate_jobs": f"{id_.hex()}:1:1"}]
    assert worker.jobs.stats is worker.scheduler.stats
    assert worker.scheduler.stats.completed == 1
    await nothing_is_left(worker)


async def test_the_parameters_of_a_jobs_answer(start, gateway, until, nothing_is_left, jobs_url):
    """The result has the parameters, and the caller's usage has the tokens."""
    worker = await start()
    worker.model.parameters = {"input_tokens": 12, "output_tokens": 34, "by": "doubler"}
    new = replace(gateway.new(1.0, 2.0), principal="team", endpoint=gateway.deployment)
    await gateway.store.accept(new)
    await gateway.publish(new)
    await until(lambda: gateway.is_in("succeeded", new.id))
    _, parameters = envelope.read_result_key(envelope.read_reply(await gateway.store.result(new.id)).key)
    assert parameters == worker.model.parameters
    used = JobUsageStore.connect(jobs_url)
    try:
        report = await used.take()
        assert report is not None
        (counts,) = [c for subject, c in report.counts.items() if subject.endpoint == gateway.deployment]
        await used.settle(report)
    finally:
        await used.close()
    assert (counts[COUNTS.index("tokens_in")], counts[COUNTS.index("tokens_out")]) == (12, 34)
    await nothing_is_left(worker)


async def test_jobs_share_calls(start, gateway, until, nothing_is_left):
    ids = [await gateway.submit(float(n), 0.0) for n in range(40)]
    worker = await start(max_rows=8)
    await until(lambda: gateway.is_in("succeeded", *ids))
    assert [await gateway.result(id_) for id_ in ids] == [[2.0 * n, 0.0] for n in range(40)]
    assert sorted(id_ for call in worker.model.calls for id_ in call) == sorted(ids), "each ran once"
    assert len(worker.model.calls) < 40
    await nothing_is_left(worker)


async def test_a_duplicate_message_is_dropped(start, gateway, until, nothing_is_left):
    def dropped() -> float:
        return REGISTRY.get_sample_value("tidegate_worker_jobs_total", {"outcome": "dropped"}) or 0.0

    worker, before = await start(), dropped()
    new = gateway.new()
    await gateway.store.accept(new)
    await asyncio.gather(*(gateway.publish(new) for _ in range(5)))
    await until(lambda: gateway.is_in("succeeded", new.id))
    await gateway.publish(new)
    await until(lambda: dropped() == before + 5)
    await nothing_is_left(worker)
    assert worker.model.calls == [[new.id]]


async def test_a_bad_job_does_not_fail_its_neighbours(start, gateway, until, nothing_is_left):
    worker = await start(serving=False)
    good, bad = await gateway.submit(1.0, 1.0), await gateway.submit(-1.0, 1.0)
    await until(lambda: len(worker.jobs.by_id) == 2)
    worker.scheduler.use(worker.model)
    await until(lambda: gateway.is_in("succeeded", good))
    await until(lambda: gateway.is_in("failed", bad))
    assert (await gateway.job(bad)).error == {"reason": "bad_request", "message": "a negative number"}
    assert worker.model.calls[0] == [good, bad]
    await nothing_is_left(worker)


async def test_jobs_that_may_not_run_twice_fail_with_the_call_that_they_shared(
    start, gateway, until, nothing_is_left
):
    worker = await start(serving=False)
    safe, never = await gateway.submit(1.0, 1.0), await gateway.submit(2.0, 2.0, retry_safe=False)
    await until(lambda: len(worker.jobs.by_id) == 2)

    def fail(requests) -> None:
        if len(requests) > 1:
            raise ModelFailed("out of tea")

    worker.model.fail = fail
    worker.scheduler.use(worker.model)
    await until(lambda: gateway.is_in("succeeded", safe))
    await until(lambda: gateway.is_in("failed", never))
    assert (await gateway.job(never)).error == {
        "reason": "model_failed",
        "message": "a model call with several requests failed, "
        "and this request may not run twice: out of tea",
    }
    assert worker.model.calls == [[safe, never], [safe]], "it ran once"
    await nothing_is_left(worker)


async def test_levels_by_weight(start, gateway, until):
    """All levels have jobs. Each is served by its weight, so the lowest does not starve."""
    levels = {}
    for level in ("low", "normal", "high"):
        for _ in range(40):
            levels[await gateway.submit(level=level)] = level
    worker = await start(max_rows=0, serving=False, call_ms=1.0)
    await until(lambda: len(worker.jobs.by_id) == 120)
    worker.scheduler.use(worker.model)
    await until(lambda: gateway.is_in("succeeded", *levels))
    order = [levels[call[0]] for call in worker.model.calls]
    assert len(order) == 120
    assert Counter(order[:42]) == {"high": 32, "normal": 8, "low": 2}


async def test_requests_go_before_jobs(start, gateway, until):
    worker = await start(max_rows=0, serving=False)
    ids = [await gateway.submit() for _ in range(2)]
    await until(lambda: worker.jobs.by_id)
    raw = envelope.request_frame(os.urandom(16), int(time.time() * 1e3) + 60_000, 0, *_key_and_data())
    item = QueuedRequest(envelope.read_request(raw), UnackedDelivery(None, 0, "nobody", 1), time.monotonic())
    worker.scheduler.add(item)
    worker.scheduler.use(worker.model)
    await until(lambda: gateway.is_in("succeeded", *ids))
    assert worker.model.calls[0] == [item.request.id]
    assert len(worker.model.calls) == 3


async def test_a_long_job_leaves_a_call_for_requests(start, gateway, until):
    worker = await start(max_rows=0, instances=1)
    worker.model.open.clear()
    ids = [await gateway.submit() for _ in range(5)]
    await until(lambda: worker.model.calls)
    raw = envelope.request_frame(os.urandom(16), int(time.time() * 1e3) + 60_000, 0, *_key_and_data())
    worker.scheduler.add(
        QueuedRequest(envelope.read_request(raw), UnackedDelivery(None, 0, "nobody", 1), time.monotonic())
    )
    await until(lambda: len(worker.model.calls) == 2)
    assert [raw[:16]] in worker.model.calls
    worker.model.open.set()
    await until(lambda: gateway.is_in("succeeded", *ids))


async def test_a_job_that_waits_too_long_goes_back_to_its_queue(start, gateway, until, monkeypatch):
    """A job that waits behind a long one goes to a replica that is free."""
    monkeypatch.setattr(consumer_module, "MAX_WAIT_S", 0.2)
    monkeypatch.setattr(consumer_module, "RETUNE_S", 0.1)
    busy = await start(max_rows=0)
    busy.model.open.clear()
    long, *others = [await gateway.submit() for _ in range(6)]
    await until(lambda: busy.model.calls == [[long]])
    free = await start(max_rows=0)
    await until(lambda: gateway.is_in("succeeded", *others))
    assert sorted(call[0] for call in free.model.calls) == sorted(others)
    busy.model.open.set()
    await until(lambda: gateway.is_in("succeeded", long))


async def test_closing_nacks_jobs_that_wait_and_finishes_those_that_run(
    start, gateway, until, nothing_is_left
):
    worker = await start(max_rows=0)
    worker.model.open.clear()
    runs, waits = await gateway.submit(), await gateway.submit()
    await until(lambda: worker.model.calls == [[runs]])
    await worker.messages.close()

    async def one_waits() -> bool:
        return await gateway.waiting() == 1

    await until(one_waits)
    assert set(worker.jobs.by_id) == {runs}
    worker.model.open.set()
    await until(lambda: gateway.is_in("succeeded", runs))
    assert await gateway.is_in("queued", waits)
    await worker.messages.open()
    await until(lambda: gateway.is_in("succeeded", waits))
    await nothing_is_left(worker)


async def test_cancelling(start, gateway, until, nothing_is_left):
    worker = await start(max_rows=0)
    worker.model.open.clear()
    runs, waits = await gateway.submit(), await gateway.submit()
    await until(lambda: worker.model.calls == [[runs]])
    for id_ in (waits, runs):
        assert (await gateway.store.cancel(id_)).state == "cancelled"
        await gateway.cancel(id_)
    await until(lambda: worker.model.cancelled == 1)
    worker.model.open.set()
    await nothing_is_left(worker)
    assert worker.model.calls == [[runs]]
    assert await gateway.is_in("cancelled", runs, waits)
    assert [event.state for event in await gateway.store.log(runs)][-2:] == ["running", "cancelled"]


async def test_a_job_expires_before_it_runs(start, gateway, until, nothing_is_left):
    worker = await start(serving=False)
    id_ = await gateway.submit(ttl_s=0.05)
    await until(lambda: worker.jobs.by_id)
    await asyncio.sleep(0.06)
    worker.scheduler.use(worker.model)
    await until(lambda: gateway.is_in("expired", id_))
    await nothing_is_left(worker)
    assert worker.model.calls == []


async def test_large_requests_and_results(start, gateway, until, claims, nothing_is_left):
    worker = await start()
    numbers = [float(n % 100) for n in range(100_000)]
    given = gateway.new(*numbers)
    request = envelope.read_request(given.frame)
    claim = await claims.give(request.data, 60, durable=True)
    id_ = await gateway.submit(*numbers, data=[claim], flags=envelope.CLAIM)
    await until(lambda: gateway.is_in("succeeded", id_))
    raw = await gateway.store.result(id_)
    assert len(raw) < 1000, "a record is no place for what is large"
    reply = envelope.read_reply(raw)
    assert reply.claimed
    (data,) = await claims.redeem(reply.data)
    assert len(data) == 400_000
    assert (await gateway.job(id_)).result_size == len(raw)
    await nothing_is_left(worker)


async def test_a_job_without_its_blob_fails(
    start, gateway, until, claims, blobs, monkeypatch, nothing_is_left
):
    from services.worker.application import job_records

    monkeypatch.setattr(job_records, "BACKOFF_S", (0.001, 0.01))
    worker = await start()
    claim = await claims.give([b"\0" * 8], 60)
    await claims.drop(claim)
    id_ = await gateway.submit(data=[claim], flags=envelope.CLAIM)
    await until(lambda: gateway.is_in("failed", id_))
    assert (await gateway.job(id_)).error["reason"] == "unavailable"
    await nothing_is_left(worker)


async def test_undecodable_jobs_become_exceptions(start, gateway, rabbitmq_url, until, nothing_is_left):
    got = []

    async def setup(channel):
        async def on_delivery(delivery):
            got.append(delivery)
            channel.ack(delivery.tag)

        await channel.declare(EXCEPTIONS)
        await channel.consume(EXCEPTIONS, on_delivery, prefetch=100)

    worker = await start()
    queue = jobs_queue(gateway.deployment, "high").name
    two = envelope.pack(envelope.REQUESTS, [gateway.new().frame, gateway.new().frame])
    async with Connection(rabbitmq_url, "letters", setup) as connection:
        await connection.wait_up(PATIENCE_S)
        for body in (b"no envelope", two):
            await gateway.channel.publish(body, routing_key=queue, persistent=True)
        await until(lambda: len([d for d in got if d.headers["queue"] == queue]) == 2)
    causes = {delivery.headers["cause"] for delivery in got if delivery.headers["queue"] == queue}
    assert causes == {"undecodable"}
    await nothing_is_left(worker)


def _key_and_data():
    read = envelope.read_request(
        envelope.request_frame(
            b"x" * 16,
            0,
            0,
            envelope.call_key((envelope.tensor("x", "FP32", (2,)),), (), {}),
            [b"\0" * 8],
        )
    )
    return read.key, read.data


async def test_a_large_result_that_cannot_be_stored_expires(
    start, gateway, until, claims, monkeypatch, nothing_is_left
):
    """The result waits while the blob store is away. After its deadline the job has expired."""

    async def away(*_, **__):
        raise Unavailable("the blob store is away")

    worker = await start()
    monkeypatch.setattr(claims, "give", away)
    id_ = await gateway.submit(*[1.0] * 100_000, ttl_s=3.0)
    await until(lambda: worker.model.calls == [[id_]])
    await until(lambda: gateway.is_in("expired", id_), "although no router sweeps here")
    assert await gateway.store.result(id_) is None
    await nothing_is_left(worker)


async def test_max_concurrency_bounds_jobs_in_calls(start, gateway, until, nothing_is_left):
    """``max_concurrency`` counts jobs too, also below the size of a batch."""
    worker = await start(instances=3, max_concurrency=3, max_rows=3, serving=False)
    worker.model.open.clear()
    ids = [await gateway.submit(float(n), 0.0) for n in range(8)]
    await until(lambda: len(worker.jobs.by_id) == 8)
    worker.scheduler.use(worker.model)
    await until(lambda: sum(map(len, worker.model.calls)) == 3)
    await asyncio.sleep(0.05)
    assert sum(map(len, worker.model.calls)) == 3
    worker.model.open.set()
    await until(lambda: gateway.is_in("succeeded", *ids))
    await nothing_is_left(worker)
