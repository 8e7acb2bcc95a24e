"""When workers, model servers and connections are lost, each request is answered or becomes a dead letter."""

from __future__ import annotations

import asyncio
import os

import pytest

from services.worker.api import requests as requests_module
from services.worker.domain import retry_after_loss
from tests.conftest import PATIENCE_S
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.errors import BadRequest, Unavailable
from tidegate.kernel.protocol import envelope

pytestmark = pytest.mark.integration


def attempts_of(body: bytes) -> list[int]:
    return [envelope.read_request(f).attempt for f in envelope.unpack(envelope.REQUESTS, body)]


async def in_hand(worker, count: int, until) -> None:
    await until(lambda: worker.scheduler.in_hand == count, f"{count} requests in hand")


async def test_the_next_worker_runs_lost_requests_one_by_one(
    start, caller, make, shown, until, nothing_is_left
):
    """Requests of one envelope run alone after their worker died: any of them may have killed it."""
    first = await start()
    first.model.open.clear()
    ids = await caller.send(*(make([n, n]) for n in range(5)))
    await until(lambda: first.model.calls == [ids])
    await first.die()
    second = await start()
    await until(lambda: len(caller.replies) == 5)
    for number, id_ in enumerate(ids):
        reply = caller.reply(id_)
        assert (reply.attempt, reply.shared, shown(reply)) == (1, 1, [[2 * number, 2 * number]])
    assert sorted(second.model.calls) == sorted([id_] for id_ in ids)
    await nothing_is_left(second)


async def test_a_request_that_must_not_run_twice_is_not_retried(
    start, caller, exceptions, make, until, nothing_is_left
):
    first = await start()
    first.model.open.clear()
    never, safe = await caller.send(make([1, 1], flags=0), make([2, 2]))
    await until(lambda: first.model.calls)
    await first.die()
    second = await start()
    await until(lambda: caller.reply(safe))
    (letter,) = await until(lambda: exceptions.got)
    assert letter.headers["cause"] == retry_after_loss.NOT_RETRIED
    assert [bytes(f[:16]) for f in envelope.unpack(envelope.REQUESTS, letter.body)] == [never]
    assert second.model.calls == [[safe]]
    await nothing_is_left(second)


async def test_the_model_server_ends_during_a_call(start, caller, make, shown, until, nothing_is_left):
    """Each request of the call runs again alone, on any worker."""
    worker = await start(serving=False)

    def crash(_) -> None:
        worker.model.fail = lambda _: None
        raise Unavailable("connection refused")

    worker.model.fail = crash
    ids = await caller.send(make([1, 1]), make([2, 2]))
    await in_hand(worker, 2, until)
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 2)
    assert [caller.reply(id_).attempt for id_ in ids] == [1, 1]
    assert [shown(caller.reply(id_)) for id_ in ids] == [[[2, 2]], [[4, 4]]]
    assert worker.model.calls == [ids, [ids[0]], [ids[1]]]
    await nothing_is_left(worker)


async def test_one_loss_of_the_model_server_is_charged_once(
    start, caller, make, shown, until, suspects, nothing_is_left
):
    """Nothing is sent to the server until it is back, so no request is charged for its absence.

    The request was alone in the only call, so the loss is charged to it.
    """
    worker = await start(again=False)

    def gone(_) -> None:
        raise Unavailable("connection refused")

    worker.model.fail = gone
    (id_,) = await caller.send(make([1, 1]))
    await until(lambda: worker.model.calls)

    async def waits() -> bool:
        return await suspects() == 1

    await until(waits)
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert worker.model.calls == [[id_]]
    worker.model.fail = lambda _: None
    worker.scheduler.use(worker.model)
    await until(lambda: caller.replies)
    assert (caller.reply(id_).attempt, shown(caller.reply(id_))) == (2, [[2, 2]])
    await nothing_is_left(worker)


async def test_a_model_lost_while_a_call_waits_for_its_batch(
    start, caller, make, shown, until, nothing_is_left
):
    """The requests of the next call wait on; they are not dropped and lose no attempt."""
    worker = await start(window_s=1.0, instances=2)
    (id_,) = await caller.send(make([1, 1]))
    await in_hand(worker, 1, until)
    worker.scheduler.use(None)
    await asyncio.sleep(1.1)
    assert worker.model.calls == []
    await in_hand(worker, 1, until)
    worker.scheduler.use(worker.model)
    await until(lambda: caller.replies)
    assert (caller.reply(id_).attempt, shown(caller.reply(id_))) == (0, [[2, 2]])
    await nothing_is_left(worker)


async def test_the_neighbours_of_a_bad_request_that_killed_the_model_server(
    start, caller, make, until, nothing_is_left
):
    """They run one by one after the failed call. If one of them ends the server, the rest wait for it."""
    worker = await start(serving=False, again=False)

    def fail(requests) -> None:
        raise BadRequest("no") if len(requests) > 1 else Unavailable("connection refused")

    worker.model.fail = fail
    ids = await caller.send(*(make([n, n]) for n in range(3)))
    await in_hand(worker, 3, until)
    worker.scheduler.use(worker.model)
    await until(lambda: len(worker.model.calls) == 2)
    await in_hand(worker, 2, until)
    assert worker.model.calls == [ids, [ids[0]]]
    worker.model.fail = lambda _: None
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 3)
    assert [caller.reply(id_).attempt for id_ in ids] == [2, 0, 0], "the first was alone in its call"
    await nothing_is_left(worker)


async def test_the_model_server_dies_each_time(start, caller, exceptions, make, until, nothing_is_left):
    worker = await start()

    def crash(_) -> None:
        raise Unavailable("connection refused")

    worker.model.fail = crash
    safe, never = await caller.send(make([1, 1]), make([2, 2], flags=0))
    await until(lambda: len(exceptions.got) == 2)
    causes = {
        bytes(envelope.unpack(envelope.REQUESTS, d.body)[0][:16]): d.headers["cause"] for d in exceptions.got
    }
    assert causes == {safe: retry_after_loss.EXHAUSTED, never: retry_after_loss.NOT_RETRIED}
    assert sum(safe in call for call in worker.model.calls) == retry_after_loss.MAX_ATTEMPTS
    assert sum(never in call for call in worker.model.calls) == 1
    assert caller.replies == {}
    await nothing_is_left(worker)


async def test_an_expired_request_is_not_retried(start, caller, exceptions, make, until, nothing_is_left):
    first = await start(serving=False)
    await caller.send(make([1, 1], deadline_ms=1))
    await in_hand(first, 1, until)
    await first.die()
    second = await start()
    (id_,) = await caller.send(make([2, 2]))
    await until(lambda: caller.reply(id_))
    assert (second.model.calls, exceptions.got) == ([[id_]], [])
    await nothing_is_left(second)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        envelope.pack(envelope.REPLIES, []),
        envelope.pack(envelope.REQUESTS, [b"too short"]),
        envelope.pack(envelope.REQUESTS, [bytes(37)]),
    ],
    ids=range(5),
)
async def test_an_undecodable_message_becomes_an_exception_and_is_settled(
    start, caller, exceptions, make, until, body, nothing_is_left
):
    worker = await start()
    await caller.send(body=body)
    (letter,) = await until(lambda: exceptions.got)
    assert (letter.body, letter.headers["cause"]) == (body, retry_after_loss.UNDECODABLE)
    assert letter.reply_to == caller.reply_to.name
    (id_,) = await caller.send(make([1, 1]))
    await until(lambda: caller.reply(id_))
    await nothing_is_left(worker)


async def test_a_lost_channel_clears_the_backlog(
    start, caller, line, make, shown, suspects, until, nothing_is_left
):
    """The broker delivers all of it again, so requests that stayed would run twice."""
    worker = await start(in_url=line.url, serving=False)
    ids = [(await caller.send(make([n, n]), make([n, n + 1])))[0] for n in range(2)]
    await in_hand(worker, 4, until)
    await line.down()
    await until(lambda: worker.requests.connection.channel is None)
    assert len(worker.scheduler.backlog) == 0
    assert worker.scheduler.in_hand == 0
    await line.up()

    async def all_are_suspects() -> bool:
        return await suspects() == 4

    await until(all_are_suspects)
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 4)
    assert shown(caller.reply(ids[1])) == [[2, 2]]
    assert all(found[0].attempt == 1 for found in caller.replies.values())
    await nothing_is_left(worker)


async def test_a_call_outlives_the_channel_of_its_delivery(
    start, caller, line, make, until, suspects, nothing_is_left
):
    """Its answer is sent. Its tag belongs to the old channel and settles nothing on the next one."""
    worker = await start(in_url=line.url)
    worker.model.open.clear()
    (id_,) = await caller.send(make([1, 1]))
    await until(lambda: worker.model.calls)
    line.cut()
    await until(lambda: worker.requests.connection.channel is None)
    await worker.requests.connection.wait_up(PATIENCE_S)

    async def comes_again() -> bool:
        """Return True once the next attempt is in hand; it waits for the call that still runs."""
        return await suspects() == 1

    await until(comes_again)
    (other,) = await caller.send(make([2, 2]))
    await in_hand(worker, 2, until)
    worker.model.open.set()
    await until(lambda: len(caller.replies.get(id_, [])) == 2 and caller.reply(other))
    assert [reply.attempt for reply in caller.replies[id_]] == [0, 1]
    await nothing_is_left(worker)


async def test_a_late_ack_settles_nothing_on_the_next_channel(
    start, caller, line, line_out, rabbitmq_url, queue, make, left, until
):
    """A redelivered message waits for the publishing connection while the consuming one reconnects.

    Its tag then means another delivery, which is in a call.
    """
    first = await start(serving=False)
    await caller.send(make([1, 1]))
    await in_hand(first, 1, until)
    worker = await start(in_url=line.url, out_url=line_out.url, instances=2, max_rows=1)
    await line_out.down()
    await until(lambda: worker.publisher.connection.channel is None)
    await first.die()
    await until(lambda: worker.requests.unsettled == 1)

    taken: list = []

    async def take(channel) -> None:
        async def keep(delivery) -> None:
            taken.append(delivery)

        await channel.consume(queue, keep, prefetch=1)

    await line.down()
    await until(lambda: worker.requests.connection.channel is None)
    async with Connection(rabbitmq_url, "other", take):
        await until(lambda: taken, "another worker has the message now")
        await line.up()
        await worker.requests.connection.wait_up(PATIENCE_S)
        original, answers = worker.model.call, asyncio.Event()

        async def call(requests, timeout_s):
            found = await original(requests, timeout_s)
            if requests[0].id == running:
                await answers.wait()
            return found

        worker.model.call = call
        running = os.urandom(16)
        await caller.send(make([2, 2], id=running))
        await until(lambda: worker.model.calls == [[running]])
        await line_out.up()
        await until(lambda: caller.replies, "the message, passed on, is answered")
        await until(lambda: worker.requests.unsettled == 1)
        await worker.die()
    last = await start()
    await until(lambda: caller.replies.get(running))
    assert [running] in last.model.calls


async def test_acks_of_many_calls_are_in_order(start, caller, make, until, nothing_is_left):
    """A group in the middle is settled first; its acks precede the one ack for all deliveries."""
    worker = await start(serving=False)
    worker.scheduler.stats.call_ms.add(0.1)
    await worker.requests.close()
    await worker.requests.open()
    for number in range(80):
        await caller.send(make([number, 0]))
    await in_hand(worker, 80, until)
    items = [worker.scheduler.backlog.take(1)[0] for _ in range(80)]
    channel = worker.requests.connection.channel
    worker.requests.settle(items[1:70])
    worker.requests.settle([items[0], items[75]])
    worker.requests.settle(items[70:75] + items[76:])
    (id_,) = await caller.send(make([1, 1]))
    worker.scheduler.use(worker.model)
    await until(lambda: caller.reply(id_))
    assert worker.requests.connection.channel is channel, "the broker refused an ack"
    await nothing_is_left(worker)


async def test_a_cancel_during_a_reply_settles_nothing_twice(start, caller, make, until, nothing_is_left):
    """Of an envelope of four, three are in a call that is cancelled while it replies, and one waits."""
    worker = await start(serving=False)

    ids = await caller.send(make([1, 1]), make([0, 0]), make([-1, -1]), make([5, 5], key="other"))
    await in_hand(worker, 4, until)
    original = worker.model.call

    async def call(requests, timeout_s):
        if len(requests) == 1 and requests[0].id == ids[1]:
            worker.model.open.clear()
        return await original(requests, timeout_s)

    worker.model.call = call
    worker.scheduler.use(worker.model)
    await until(lambda: [ids[1]] in worker.model.calls and caller.reply(ids[0]))
    await caller.cancel(*ids[:3])
    await until(lambda: worker.model.cancelled == 1)
    await until(lambda: [ids[3]] in worker.model.calls)
    assert worker.requests.unsettled == 1, "its delivery still has an open request"
    await worker.die()
    second = await start()
    await until(lambda: caller.reply(ids[3]))
    await nothing_is_left(second)


async def test_a_worker_that_stops_returns_its_requests_to_the_queue(start, caller, make, left, until):
    """After the drain limit, the call in flight and the requests behind it go to another worker."""
    worker = await start()
    worker.model.open.clear()
    (running,) = await caller.send(make([1, 1]))
    await until(lambda: worker.model.calls)
    (waiting,) = await caller.send(make([2, 2]))
    await in_hand(worker, 2, until)

    async def left_is_two() -> bool:
        return await left() == 2

    await worker.stop()
    await until(left_is_two)
    await start()
    await until(lambda: caller.reply(running) and caller.reply(waiting))


async def test_draining(start, caller, make, left, until):
    """The worker consumes no more, finishes what it has, and then holds nothing."""
    worker = await start()
    worker.model.open.clear()
    (taken,) = await caller.send(make([1, 1]))
    await until(lambda: worker.model.calls)
    await worker.requests.close()
    await caller.send(make([2, 2]))
    worker.model.open.set()
    await until(lambda: worker.scheduler.in_hand == 0)
    await until(lambda: worker.requests.unsettled == 0)
    await until(lambda: caller.reply(taken))
    assert await left() == 1
    await worker.requests.open()
    await until(lambda: len(caller.replies) == 2)


async def test_draining_without_a_broker(start, line, until):
    """The drain of a worker without a connection ends too."""
    worker = await start(in_url=line.url)
    await line.down()
    await until(lambda: worker.requests.connection.channel is None)
    await worker.requests.close()
    await worker.requests.open()
    await worker.requests.close()
    assert worker.requests.unsettled == 0


async def test_without_a_model_the_backlog_waits(start, caller, make, until):
    worker = await start()
    worker.scheduler.use(None)
    (id_,) = await caller.send(make([1, 1]))
    await in_hand(worker, 1, until)
    assert worker.model.calls == []
    worker.scheduler.use(worker.model)
    await until(lambda: caller.reply(id_))


async def test_the_prefetch_grows_for_light_calls(start, caller, make, until, monkeypatch):
    """The prefetch follows the measured durations, by a new consumer."""
    monkeypatch.setattr(requests_module, "RETUNE_S", 0.01)
    worker = await start(serving=False)
    for number in range(60):
        await caller.send(make([number, 0]))
    await in_hand(worker, 3, until)  # two, and a margin for a caller whose turn it is
    worker.scheduler.stats.call_ms.add(0.5)
    await in_hand(worker, 60, until)
    assert worker.requests.unsettled == 60
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 60)


async def test_retuning_survives_a_lost_connection(start, caller, line, make, until, monkeypatch):
    monkeypatch.setattr(requests_module, "RETUNE_S", 0.005)
    worker = await start(in_url=line.url)
    for call_ms in (0.1, 1000.0) * 3:
        worker.scheduler.stats.call_ms.value = call_ms
        line.cut()
        await until(lambda: worker.requests.connection.channel is None)
        await worker.requests.connection.wait_up(PATIENCE_S)
    worker.scheduler.stats.call_ms.value = 1.0
    await until(lambda: worker.requests._prefetch == 62)  # 50 ms of calls, and a quarter more
    assert not worker.requests._retune_task.done()
    (id_,) = await caller.send(make([1, 1]))
    await until(lambda: caller.replies.get(id_))


async def test_a_deleted_queue_comes_back(start, caller, make, queue, until):
    worker = await start()
    await caller.channel.delete(queue)
    channel = worker.requests.connection.channel

    async def answered() -> bool:
        await caller.send(make([1, 1], id=os.urandom(16)))
        return bool(caller.replies)

    await until(answered)
    assert worker.requests.connection.channel is not channel or worker.requests.connection.channel is not None


async def test_closed_while_its_consumer_starts(start, caller, make, left, line, hold_up):
    """A new channel is being set up when the worker is closed."""
    worker = await start(in_url=line.url)
    consuming = hold_up("requests.v1.")
    line.cut()
    await consuming.begun.wait()
    closing = asyncio.create_task(worker.requests.close())
    await asyncio.sleep(0)
    consuming.go.set()
    await closing
    await worker.requests.connection.wait_up(PATIENCE_S)
    await caller.send(make([1, 2]))
    await asyncio.sleep(0.1)
    assert worker.model.calls == []
    assert await left() == 1
