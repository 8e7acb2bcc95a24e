"""The dispatcher: requests out, replies back, over the real broker, through failures."""

from __future__ import annotations

import asyncio
import os
import struct
import time
from dataclasses import replace

import orjson
import pytest

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.application.inference.core import failure
from services.gateway.domain.envelope_size import MAX_BYTES
from services.gateway.domain.fair_lane import FlowKey
from services.gateway.domain.memory_budget import MemoryBudget
from services.gateway.domain.replica_fleet import ReplicaFleet
from tests.conftest import PATIENCE_S
from tests.integration.gateway import conftest
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import Queue, replies_queue
from tidegate.kernel.errors import DeadlinePassed, ModelFailed, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Tensor
from tidegate.kernel.protocol.tenant import caller_of
from tidegate.kernel.protocol.tensors import DATATYPES

pytestmark = pytest.mark.integration

KEY = envelope.call_key((Tensor("x", DATATYPES["FP32"], (2,)),), (), {})


def submit(dispatcher: Dispatcher, route, number: int = 0, timeout_s: float = PATIENCE_S, size: int = 0):
    data = struct.pack("<2f", number, -number) + bytes(size)
    return conftest.submit(dispatcher, route, 1, KEY, data, timeout_s, b"trace-%d" % number)


def told(reply) -> int:
    """Return the number in a reply."""
    return int(struct.unpack_from("<f", reply.data[0])[0])


def load(dispatcher: Dispatcher, route) -> tuple[int, int, int]:
    found = dispatcher.queue_of(route).load
    return found.outstanding, found.arrived, found.completed


async def test_an_answer(dispatch, peer, route):
    dispatcher = await dispatch()
    before_ms = time.time() * 1e3
    id_, future = submit(dispatcher, route(), 7)
    assert load(dispatcher, route()) == (1, 1, 0)
    reply = await future
    assert (reply.id, reply.status, told(reply), reply.rows) == (id_, envelope.OK, 7, 1)
    assert (reply.wait_us, reply.compute_us) == (100, 200)
    assert load(dispatcher, route()) == (0, 1, 1)
    (seen,) = peer.requests
    assert (seen.trace, seen.attempt, seen.flags) == (b"trace-7", 0, envelope.RETRY_SAFE)
    limit_ms = PATIENCE_S * 1e3
    assert before_ms + limit_ms - 1 <= seen.deadline_ms <= time.time() * 1e3 + limit_ms


async def test_a_failure(dispatch, peer, route):
    peer.answer = lambda r: envelope.failure_frame(r.id, r.attempt, "model_failed", "out of tea")
    _, future = submit(await dispatch(), route())
    found = failure(await future)
    assert (type(found), found.message) == (ModelFailed, "out of tea")


async def test_each_request_gets_its_own_answer(dispatch, peer, route):
    dispatcher = await dispatch()
    futures = [submit(dispatcher, route(), n)[1] for n in range(500)]
    assert [told(reply) for reply in await asyncio.gather(*futures)] == list(range(500))
    assert load(dispatcher, route()) == (0, 500, 500)


async def test_answers_in_any_order(dispatch, peer, route, until):
    dispatcher = await dispatch()
    held: list = []
    peer.answer = lambda request: held.append(request)
    pairs = [submit(dispatcher, route(), n) for n in range(20)]
    await until(lambda: len(held) == 20)
    channel = peer.connection.channel
    for request in reversed(held):
        frame = envelope.reply_frame(request.id, 0, 1, b"\0\0", list(request.data))
        body = envelope.pack(envelope.REPLIES, [frame])
        await channel.publish(body, routing_key=peer.deliveries[0].reply_to)
    assert [told(await future) for _, future in pairs] == list(range(20))


async def test_the_deadline(dispatch, peer, route, until):
    peer.answer = lambda _: None
    dispatcher = await dispatch()
    _, future = submit(dispatcher, route(), timeout_s=0.05)
    with pytest.raises(DeadlinePassed, match="the deadline passed before the answer arrived"):
        await future
    assert load(dispatcher, route()) == (0, 1, 1)
    id_, future = submit(dispatcher, route(), timeout_s=PATIENCE_S)
    await until(lambda: any(request.id == id_ for request in peer.requests))
    assert peer.cancelled == [], "an expired request carries its deadline, so no cancel is needed"
    dispatcher.abandon(id_)


async def test_the_deadline_holds_without_a_broker(dispatch, line, route, until):
    dispatcher = await dispatch(line.url)
    await line.down()
    await until(lambda: dispatcher.out.channel is None)
    _, future = submit(dispatcher, route(), timeout_s=0.05)
    with pytest.raises(DeadlinePassed):
        await future
    assert dispatcher.problem() is not None


async def test_a_late_answer_is_ignored(dispatch, peer, route, until):
    dispatcher = await dispatch()
    held: list = []
    peer.answer = lambda request: held.append(request)
    id_, future = submit(dispatcher, route())
    await until(lambda: held)
    dispatcher._expire(id_)
    with pytest.raises(DeadlinePassed):
        await future
    # Twice, with a request still in flight.
    peer.answer = lambda request: None
    _, waiting = submit(dispatcher, route(), 5)
    await until(lambda: len(peer.requests) == 2)
    frames = [
        envelope.reply_frame(r.id, 0, 1, b"\0\0", list(r.data)) for r in (held[0], held[0], *peer.requests)
    ]
    await peer.connection.channel.publish(
        envelope.pack(envelope.REPLIES, list(frames)), routing_key=peer.deliveries[0].reply_to
    )
    assert told(await waiting) == 5
    assert load(dispatcher, route()) == (0, 2, 2)


async def test_garbage_on_the_reply_queue(dispatch, peer, route):
    """Garbage is dropped; the replies after it are read."""
    dispatcher = await dispatch()
    _, first = submit(dispatcher, route())
    await first
    reply_to = peer.deliveries[0].reply_to
    for body in (
        b"",
        b"garbage",
        envelope.pack(envelope.CANCELS, []),
        envelope.pack(envelope.REPLIES, [b"x"]),
    ):
        await peer.connection.channel.publish(body, routing_key=reply_to)
    _, second = submit(dispatcher, route(), 2)
    assert told(await second) == 2


async def test_abandoned_requests_are_cancelled(dispatch, peer, route, until):
    peer.answer = lambda _: None
    dispatcher = await dispatch()
    pairs = [submit(dispatcher, route(), n) for n in range(3)]
    await until(lambda: len(peer.requests) == 3)
    for id_, _ in pairs[:2]:
        dispatcher.abandon(id_)
        dispatcher.abandon(id_)
    await until(lambda: len(peer.cancelled) >= 2)
    assert sorted(peer.cancelled) == sorted(id_ for id_, _ in pairs[:2])
    assert load(dispatcher, route()) == (1, 3, 2)
    dispatcher.abandon(pairs[2][0])


async def test_a_request_abandoned_before_it_left_is_not_sent(dispatch, peer, route, until):
    dispatcher = await dispatch()
    id_, _ = submit(dispatcher, route(), 1)
    dispatcher.abandon(id_)
    _, other = submit(dispatcher, route(), 2)
    assert told(await other) == 2
    assert [r.id for r in peer.requests if r.id == id_] == []


async def test_envelopes_fill_under_load(dispatch, peer, route, deployment, fleets):
    """With two ready replicas of a light model, the requests of one turn leave in two envelopes."""
    fleets[deployment] = ReplicaFleet(2, 0.05)
    dispatcher = await dispatch()
    futures = [submit(dispatcher, route(), n)[1] for n in range(60)]
    await asyncio.gather(*futures)
    assert [len(e) for e in peer.envelopes] == [30, 30]
    assert [int(struct.unpack("<2f", r.data[0])[0]) for r in peer.requests] == list(range(60))


async def test_a_callers_flood_waits_in_the_gateway_and_the_others_go_first(
    dispatch, peer, route, deployment, fleets, until
):
    """The replica holds four requests. Those of the second caller overtake the first one's."""
    fleets[deployment] = ReplicaFleet(1, 20.0, holds=4)
    peer.answer = lambda _: None
    dispatcher = await dispatch()
    flood, light = FlowKey("m", "flood"), FlowKey("m", "light")

    def send(caller: FlowKey) -> bytes:
        return dispatcher.send(route(), 1, b"k", [b""], PATIENCE_S, b"", lambda _: None, caller=caller)

    ids = [send(flood) for _ in range(12)]
    await until(lambda: len(peer.requests) == 4)
    light_ids = [send(light) for _ in range(4)]
    await until(lambda: len(peer.requests) == 6)  # its share of the window is two
    for id_ in (*ids[:4], *light_ids[:2]):
        dispatcher.abandon(id_)
    await until(lambda: len(peer.requests) == 10)
    order = [caller_of(request.tenant) for request in peer.requests]
    assert order[:6] == ["flood"] * 4 + ["light"] * 2
    assert "light" in order[6:]
    assert dispatcher.loads()[deployment].flows == {"m/flood": [8, 1], "m/light": [2, 1]}
    for id_ in (*ids[4:], *light_ids[2:]):
        dispatcher.abandon(id_)
    assert dispatcher.loads()[deployment].outstanding == 0


@pytest.mark.parametrize(
    "fleet", [ReplicaFleet(0, None), ReplicaFleet(1, None), ReplicaFleet(1, 20.0)], ids=str
)
async def test_envelopes_of_one(dispatch, peer, route, deployment, fleets, fleet):
    """For a heavy model, and for a model without a measurement."""
    fleets[deployment] = fleet
    dispatcher = await dispatch()
    await asyncio.gather(*(submit(dispatcher, route(), n)[1] for n in range(10)))
    assert [len(e) for e in peer.envelopes] == [1] * 10


async def test_envelopes_stay_within_the_size_limit(dispatch, peer, route, deployment, fleets):
    fleets[deployment] = ReplicaFleet(1, 0.01)
    dispatcher = await dispatch()
    sizes = [MAX_BYTES // 3] * 4 + [MAX_BYTES * 2, 10]
    replies = await asyncio.gather(
        *(submit(dispatcher, route(), n, size=size)[1] for n, size in enumerate(sizes))
    )
    assert [told(reply) for reply in replies] == list(range(6))
    assert [len(e) for e in peer.envelopes] == [2, 2, 1, 1]


async def test_each_deployment_has_its_queue(dispatch, peer, route, rabbitmq_url, fresh, until):
    """One turn of the event loop has requests to two Deployments."""
    from services.gateway.domain.routing import parse_table

    other_name = fresh("other")
    raw = {"epoch": "e", "n": 1, "endpoints": {}, "deployments": {other_name: {**_entry(), "queue": ""}}}
    raw["endpoints"] = {
        "m": {"targets": [{"deployment": other_name, "weight": 1}], "versions": {}, "default_timeout_ms": 1}
    }
    other = parse_table(raw).find("m", "")[1]
    dispatcher = await dispatch()
    _, ours = submit(dispatcher, route(), 1)
    theirs_id, theirs = submit(dispatcher, other, 2)
    assert told(await ours) == 1
    assert [r.id for r in peer.requests if r.id == theirs_id] == []
    assert not theirs.done()
    assert dispatcher.loads()[other_name].outstanding == 1
    dispatcher.abandon(theirs_id)


def _entry() -> dict:
    return {
        "model": "m",
        "version": 1,
        "format": "onnx",
        "signature": None,
        "max_queue": 1,
        "retry": "safe",
        "wakeable": True,
        "ready": 0,
    }


async def test_requests_wait_for_a_worker(rabbitmq_url, dispatch, route, deployment, make_peer):
    """The queue exists before any worker, and a demand hint is published."""
    dispatcher = await dispatch()
    _, future = submit(dispatcher, route(), 3)
    async with make_peer(deployment) as late:
        assert told(await future) == 3
        assert late.deliveries[0].redelivered is False


async def test_demand_is_published_once_a_second(dispatch, peer, route, deployment, fleets, until):
    dispatcher = await dispatch()
    began = time.monotonic()
    for number in range(20):
        await submit(dispatcher, route(), number)[1]
        dispatcher.demand(route())
    await until(lambda: peer.demanded)
    assert peer.demanded.count(deployment) <= 2 + (time.monotonic() - began)
    fleets[deployment] = ReplicaFleet(1, 1.0)
    count = len(peer.demanded)
    await submit(dispatcher, route())[1]
    assert len(peer.demanded) == count, "with a ready replica no demand is published"


async def test_the_queue_was_deleted(dispatch, peer, route, until):
    """The request fails, and the next one declares the queue again."""
    peer.answer = lambda _: None
    dispatcher = await dispatch()
    id_, _ = submit(dispatcher, route(), timeout_s=20)
    await until(lambda: peer.requests)
    dispatcher.abandon(id_)
    await peer.connection.stop()
    async with Connection(str(dispatcher.out._url), "admin", _nothing) as admin:
        await (await admin.wait_up(PATIENCE_S)).delete(peer.queue)
    _, second = submit(dispatcher, route())
    with pytest.raises(Unavailable, match="was deleted"):
        await second
    _, third = submit(dispatcher, route(), 3)
    peer.answer = _echo_number
    async with peer.connection:
        assert told(await third) == 3


async def _nothing(_) -> None:
    return


def _echo_number(request):
    return envelope.reply_frame(request.id, request.attempt, 1, b"\0\0", list(request.data))


async def test_requests_survive_a_lost_connection(dispatch, peer, line, route, until):
    """Requests that may be lost are sent once more, under the same id. The first answer counts."""
    dispatcher = await dispatch(line.url)
    answered: list = []
    peer.answer = lambda request: None
    pairs = [submit(dispatcher, route(), n) for n in range(10)]
    await until(lambda: len(peer.requests) == 10)
    await line.down()
    await until(lambda: dispatcher.out.channel is None)
    waiting = [submit(dispatcher, route(), 100 + n) for n in range(5)]

    def keep(request):
        answered.append(request)
        return _echo_number(request)

    peer.answer = keep
    await line.up()
    replies = await asyncio.gather(*(future for _, future in pairs + waiting))
    assert [told(r) for r in replies] == [*range(10), *range(100, 105)]
    assert sorted(r.id for r in answered) == sorted(id_ for id_, _ in pairs + waiting)
    assert load(dispatcher, route()) == (0, 15, 15)


async def test_nothing_is_sent_a_third_time(dispatch, peer, line, route, until):
    peer.answer = lambda request: None
    dispatcher = await dispatch(line.url)
    id_, future = submit(dispatcher, route())
    for times in (1, 2):
        await until(lambda times=times: len(peer.requests) == times)
        channel = dispatcher.out.channel
        line.cut()
        await until(lambda channel=channel: dispatcher.out.channel not in (None, channel))
    submit(dispatcher, route(), 9)
    await until(lambda: len(peer.requests) > 2)
    assert [r.id for r in peer.requests].count(id_) == 2
    assert not future.done()
    await dispatcher.stop()
    with pytest.raises(Unavailable):
        await future


async def test_requests_with_retry_never_are_not_sent_again(dispatch, peer, line, route, until):
    peer.answer = lambda request: None
    dispatcher = await dispatch(line.url)
    never = route(retry="never")
    id_, sent = submit(dispatcher, never, 1)
    await until(lambda: peer.requests)
    assert peer.requests[0].flags == 0
    await line.down()
    await until(lambda: dispatcher.out.channel is None)
    _, unsent = submit(dispatcher, never, 2)
    peer.answer = _echo_number
    await line.up()
    with pytest.raises(Unavailable, match="not sent again"):
        await sent
    assert told(await unsent) == 2
    assert [r.id for r in peer.requests].count(id_) == 1


async def test_replies_wait_while_the_gateway_is_cut_off(dispatch, peer, line, route, until):
    """The reply queue survives the connection."""
    dispatcher = await dispatch(line.url)
    held: list = []
    peer.answer = lambda request: held.append(request)
    _, future = submit(dispatcher, route(retry="safe"), 4)
    await until(lambda: held)
    await line.down()
    await until(lambda: dispatcher.back.channel is None and dispatcher.out.channel is None)
    peer.answer = lambda request: None

    async def dropped() -> bool:
        answer = await peer.connection.channel.consumers(replies_queue(held[0].id[:8].hex()))
        return answer == 0

    await until(dropped, "the broker has noticed, too")
    await peer.connection.channel.publish(
        envelope.pack(envelope.REPLIES, [_echo_number(held[0])]), routing_key=peer.deliveries[0].reply_to
    )
    await line.up()
    assert told(await future) == 4


async def test_the_queue_vanishes_with_the_connection(dispatch, peer, line, route, rabbitmq_url, until):
    """A message that finds neither channel nor queue is not lost, and raises no unhandled error."""
    dispatcher = await dispatch(line.url)
    unhandled: list = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    _, future = submit(dispatcher, route(), 6)
    line.cut()
    assert told(await future) == 6
    await until(lambda: not dispatcher._tasks)
    assert unhandled == []


async def test_a_message_that_the_broker_refuses_fails_at_once(dispatch, deployment, route):
    """Before its deadline."""
    full = Queue(f"requests.v1.{deployment}", {"x-max-length": 1, "x-overflow": "reject-publish"})
    narrow = replace(route(), queue=full)
    dispatcher = await dispatch()
    kept_id, kept = submit(dispatcher, narrow, 1)
    _, refused = submit(dispatcher, narrow, 2)
    with pytest.raises(Unavailable):
        await refused
    assert not kept.done()
    dispatcher.abandon(kept_id)


async def test_an_envelope_that_cannot_be_encoded_fails_alone_and_at_once(dispatch, peer, route, monkeypatch):
    """No such envelope is known. Its callers must not wait for their deadlines."""
    dispatcher = await dispatch(max_frames=1)
    assert told(await submit(dispatcher, route(), 1)[1]) == 1
    channel = dispatcher.out.channel
    send, spoilt = channel.send, iter([True])

    def sometimes(body, **given):
        if next(spoilt, False):
            raise ValueError("nobody thought of it")
        send(body, **given)

    monkeypatch.setattr(channel, "send", sometimes)
    (_, bad), (_, good) = (submit(dispatcher, route(), number) for number in (2, 3))
    with pytest.raises(Unavailable, match="could not be sent"):
        await bad
    assert told(await good) == 3


async def test_stopping_fails_requests_in_flight(dispatch, peer, route):
    peer.answer = lambda _: None
    dispatcher = await dispatch()
    _, future = submit(dispatcher, route())
    await dispatcher.stop()
    with pytest.raises(Unavailable, match="the gateway is stopping"):
        await future


async def test_problem(rabbitmq_url, line, until, fleets, claims):
    dispatcher = Dispatcher(line.url, os.urandom(8), fleets, claims=claims, answers=MemoryBudget(1))
    assert dispatcher.problem() == "RabbitMQ is not connected yet."
    dispatcher.start()
    await until(lambda: dispatcher.problem() is None)
    await line.down()
    await until(lambda: "RabbitMQ" in (dispatcher.problem() or ""))
    await dispatcher.stop()


async def test_ids_of_two_gateways_differ(dispatch, peer, route):
    one, other = await dispatch(), await dispatch()
    first, second = submit(one, route(), 1), submit(other, route(), 2)
    assert first[0] != second[0]
    assert [told(await first[1]), told(await second[1])] == [1, 2]
    assert len({d.reply_to for d in peer.deliveries}) == 2
    assert peer.deliveries[0].reply_to == replies_queue(peer.requests[0].id[:8].hex()).name


async def test_the_hint_is_json(dispatch, rabbitmq_url, route, deployment, peer, until):
    seen: list = []
    original = peer._on_demand

    async def keep(delivery) -> None:
        seen.append(orjson.loads(delivery.body))
        await original(delivery)

    peer._on_demand = keep
    line_session = peer.connection.channel
    await line_session.consume(peer._events, keep, prefetch=1, no_ack=True)
    dispatcher = await dispatch()
    for _ in range(2):
        dispatcher._events._demanded_at.clear()
        dispatcher.demand(route())
        await submit(dispatcher, route())[1]
    await until(lambda: seen)
    assert seen[0] == {"deployment": deployment}
