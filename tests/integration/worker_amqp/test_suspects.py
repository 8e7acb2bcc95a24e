"""Requests lost with a worker or a model server run alone, and only a loss there is charged to one."""

from __future__ import annotations

import asyncio
import time

import pytest

from services.worker.api import suspects as suspects_module
from services.worker.application import batch_scheduler as batch_scheduler_module
from services.worker.domain import retry_after_loss
from tests.integration.worker_amqp.test_losses import attempts_of, in_hand
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope

pytestmark = pytest.mark.integration


async def test_a_request_that_kills_workers_is_given_up(start, caller, exceptions, make, until):
    """It runs once with others and twice alone. Then the router gets it, with its reply queue."""
    frame = make([1, 1], tenant=b"acme")
    (id_,) = await caller.send(frame)
    for _ in range(retry_after_loss.MAX_ATTEMPTS):
        worker = await start(serving=False)
        worker.model.open.clear()
        worker.scheduler.use(worker.model)
        await until(lambda worker=worker: worker.model.calls == [[id_]])
        # The next attempt is here before the last one is acked.
        await until(lambda worker=worker: worker.requests.unsettled == 1)
        assert exceptions.got == []
        await worker.die()
    last = await start()
    (letter,) = await until(lambda: exceptions.got)
    assert letter.headers["cause"] == retry_after_loss.EXHAUSTED
    assert letter.reply_to == caller.reply_to.name
    assert attempts_of(letter.body) == [retry_after_loss.MAX_ATTEMPTS]
    (given_up,) = envelope.unpack(envelope.REQUESTS, letter.body)
    assert bytes(given_up) == envelope.with_attempt(frame, retry_after_loss.MAX_ATTEMPTS)
    assert (caller.reply(id_), last.model.calls) == (None, [])


async def until_it_kills(worker, killer: bytes, exceptions, until) -> bool:
    """Run a worker until the killer is in a call; return False if it was given up before."""
    original, killing = worker.model.call, asyncio.Event()

    async def call(requests, timeout_s):
        if any(request.id == killer for request in requests):
            worker.model.open.clear()
            killing.set()
        return await original(requests, timeout_s)

    worker.model.call = call
    worker.scheduler.use(worker.model)
    await until(lambda: exceptions.got or killing.is_set())
    return not exceptions.got


async def test_64_held_requests_and_one_that_kills(start, caller, exceptions, make, shown, until):
    """All other requests of the worker and of the call are answered; only the killer is given up."""
    ids = []
    for first in range(0, 64, 8):
        ids += await caller.send(*(make([n, n]) for n in range(first, first + 8)))
    killer, deaths = ids[37], 0
    while deaths < 10:
        worker = await start(serving=False)
        worker.scheduler.stats.call_ms.add(0.1)  # as after a while of light calls: hold all of them
        await worker.requests.close()
        await worker.requests.open()
        if deaths == 0:
            await in_hand(worker, 64, until)
        if not await until_it_kills(worker, killer, exceptions, until):
            break
        deaths += 1
        await worker.die()
    await until(lambda: len(caller.replies) == 63)
    assert deaths == retry_after_loss.MAX_ATTEMPTS
    (letter,) = exceptions.got
    assert bytes(envelope.unpack(envelope.REQUESTS, letter.body)[0][:16]) == killer
    for number, id_ in enumerate(ids):
        if id_ != killer:
            assert shown(caller.replies[id_][0]) == [[2 * number, 2 * number]]


async def test_requests_of_a_second_worker_survive_a_killer(start, caller, exceptions, make, shown, until):
    """A killer that another worker takes runs there with nothing beside it."""
    first = await start()
    first.model.open.clear()
    (killer,) = await caller.send(make([1, 1]))
    await until(lambda: first.model.calls == [[killer]])
    await first.die()
    others: list[bytes] = []
    for _ in range(retry_after_loss.MAX_ATTEMPTS - 1):
        worker = await start(serving=False, instances=4, max_rows=1)
        sent = await caller.send(*(make([n, n]) for n in range(6)))
        others += sent
        await in_hand(worker, len(sent), until)
        assert await until_it_kills(worker, killer, exceptions, until)
        assert worker.model.calls[-1] == [killer]
        assert worker.scheduler.in_hand == len(sent) + 1 - (len(worker.model.calls) - 1), "they wait"
        await worker.die()
    last = await start()
    (letter,) = await until(lambda: exceptions.got)
    assert bytes(envelope.unpack(envelope.REQUESTS, letter.body)[0][:16]) == killer
    await until(lambda: len(caller.replies) == len(others))
    assert {reply.attempt for found in caller.replies.values() for reply in found} <= {0, 1}, (
        "none is charged"
    )
    assert last.scheduler.serving


async def test_a_suspect_runs_alone_and_the_others_stay_in_the_queue(
    start, caller, make, until, suspects, nothing_is_left
):
    """Suspects that have not started stay in the queue, so a death of the worker is not charged to them."""
    first = await start()
    first.model.open.clear()
    ids = await caller.send(*(make([n, n]) for n in range(3)))
    await until(lambda: first.model.calls == [ids])
    await first.die()
    second = await start(serving=False, instances=4)
    second.model.open.clear()
    second.scheduler.use(second.model)
    await until(lambda: len(second.model.calls) == 1)
    (fresh,) = await caller.send(make([9, 9]))
    await in_hand(second, 2, until)
    assert await suspects() == 2
    assert second.model.calls == [[ids[0]]]
    second.model.open.set()
    await until(lambda: len(caller.replies) == 4)
    assert {caller.reply(id_).attempt for id_ in ids} == {1}
    assert caller.reply(fresh).attempt == 0
    await nothing_is_left(second)


async def test_a_suspect_waits_for_open_calls_up_to_a_limit(
    start, caller, make, until, suspects, monkeypatch, nothing_is_left
):
    """A long call has killed no worker. Suspects do not wait for its end, or all of them would be delayed."""
    monkeypatch.setattr(batch_scheduler_module, "OTHERS_END_S", 0.3)
    worker = await start(instances=2, max_rows=1)
    worker.model.open.clear()
    (long,) = await caller.send(make([1, 1]))
    await until(lambda: worker.model.calls == [[long]])
    lost = envelope.read_request(make([2, 2]))
    began = time.monotonic()
    await worker.publisher.retry_or_give_up(lost, caller.reply_to.name, alone=False)
    await until(lambda: worker.model.calls == [[long], [lost.id]])
    assert time.monotonic() - began > 0.3
    worker.model.open.set()
    await until(lambda: len(caller.replies) == 2)
    await nothing_is_left(worker)


async def test_a_long_suspect_does_not_delay_other_requests(
    start, caller, make, until, monkeypatch, nothing_is_left
):
    monkeypatch.setattr(suspects_module, "HOLD_S", 0.1)
    worker = await start(instances=2, max_rows=1)
    worker.model.open.clear()
    lost = envelope.read_request(make([2, 2]))
    await worker.publisher.retry_or_give_up(lost, caller.reply_to.name, alone=False)
    await until(lambda: worker.model.calls == [[lost.id]])
    (fresh,) = await caller.send(make([1, 1]))
    await until(lambda: worker.model.calls == [[lost.id], [fresh]])
    worker.model.open.set()
    await until(lambda: len(caller.replies) == 2)
    await nothing_is_left(worker)


async def test_a_suspect_whose_worker_closes_is_not_charged(start, caller, make, until, suspects):
    """A suspect that came between the last call and the end of the consumer is published again unchanged."""
    worker = await start()
    worker.model.open.clear()
    lost = [envelope.read_request(make([n, n])) for n in range(2)]
    for request in lost:
        await worker.publisher.retry_or_give_up(request, caller.reply_to.name, alone=False)
    await until(lambda: worker.model.calls == [[lost[0].id]])
    closing = asyncio.create_task(worker.requests.close())
    await closing
    worker.model.open.set()
    await until(lambda: caller.reply(lost[0].id))

    async def is_back() -> bool:
        return await suspects() == 1 and worker.requests.unsettled == 0

    await until(is_back)
    await worker.die()
    await start()
    reply = await until(lambda: caller.reply(lost[1].id))
    assert reply.attempt == 1


async def test_calls_that_were_open_together_are_not_charged(
    start, caller, exceptions, make, until, nothing_is_left
):
    """Two calls were open when the model server died: neither is charged, both run alone next."""
    worker = await start(serving=False, instances=2, max_rows=1, again=False)
    gone = asyncio.Event()
    original = worker.model.call

    async def call(requests, timeout_s):
        if not gone.is_set():
            worker.model.calls.append([r.id for r in requests])
            await gone.wait()
            raise Unavailable("connection refused")
        return await original(requests, timeout_s)

    worker.model.call = call
    ids = await caller.send(make([1, 1]), make([2, 2]))
    await in_hand(worker, 2, until)
    worker.scheduler.use(worker.model)
    await until(lambda: len(worker.model.calls) == 2)
    gone.set()
    await until(lambda: not worker.scheduler.serving)
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 2)
    assert [caller.reply(id_).attempt for id_ in ids] == [1, 1]
    assert exceptions.got == []
    await nothing_is_left(worker)


async def test_a_copy_for_shadow_traffic_is_dropped_with_its_worker(
    start, caller, exceptions, make, until, suspects, nothing_is_left
):
    """It is no suspect and no dead letter, and counts neither as load nor as work of the replica."""
    first = await start()
    first.model.open.clear()
    (copy,) = await caller.send(make([1, 1], flags=envelope.COPY | envelope.RETRY_SAFE))
    await until(lambda: first.model.calls == [[copy]])
    assert (first.scheduler.in_hand, first.scheduler.copies) == (1, 1)
    await first.die()
    second = await start()
    (fresh,) = await caller.send(make([2, 2]))
    (other,) = await caller.send(make([3, 3], flags=envelope.COPY | envelope.RETRY_SAFE))
    await until(lambda: caller.reply(fresh) and caller.reply(other))
    assert (caller.reply(copy), exceptions.got, await suspects()) == (None, [], 0)
    assert (second.scheduler.stats.completed, second.model.calls) == (1, [[fresh], [other]])
    await nothing_is_left(second)
