"""Chunks of language models' streams on their way to the gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from services.worker.adapters.chunk_sender import MAX_WAITING_BYTES, ChunkSender
from services.worker.adapters.reply_publisher import GatewayGone, ReplyPublisher
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply

pytestmark = pytest.mark.unit


class Broker:
    """A publisher that keeps the messages. It confirms one for each permit in ``go``."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, list[Buffer | Reply]]] = []
        self.go = asyncio.Semaphore(0)
        self.fail: Exception | None = None

    async def send_chunks(
        self, reply_to: str, frames: Sequence[Buffer | Reply], *, left_s: float = 60.0
    ) -> None:
        self.messages.append((reply_to, list(frames)))
        await self.go.acquire()
        if self.fail is not None:
            raise self.fail

    def confirm(self, count: int = 1) -> None:
        for _ in range(count):
            self.go.release()


def sender_to(broker: Broker) -> ChunkSender:
    return ChunkSender(cast(ReplyPublisher, broker))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def send(sender: ChunkSender, *frames: bytes, reply_to: str = "g") -> None:
    for frame in frames:
        await sender.send_chunks(reply_to, [frame], left_s=1.0)


async def test_a_stream_waits_for_no_confirm_and_chunks_share_messages():
    broker = Broker()
    sender = sender_to(broker)
    await send(sender, b"a1")
    await turns()
    await send(sender, b"b1", b"a2", b"b2")
    await send(sender, b"c1", reply_to="h")
    last = asyncio.ensure_future(sender.reply_last("g", b"a-end"))
    await turns()
    assert broker.messages == [("g", [b"a1"]), ("h", [b"c1"])]
    broker.confirm(2)
    await turns()
    assert broker.messages[2:] == [("g", [b"b1", b"a2", b"b2", b"a-end"])]
    assert not last.done(), "the request is acked only when the broker has all of its answer"
    broker.confirm()
    await last


async def test_chunks_that_are_ready_in_one_turn_share_the_first_message():
    broker = Broker()
    sender = sender_to(broker)
    await asyncio.gather(*(send(sender, b"%d" % n) for n in range(5)))
    await turns()
    assert broker.messages == [("g", [b"0", b"1", b"2", b"3", b"4"])]
    await sender.stop()


async def test_streams_wait_while_the_broker_takes_nothing():
    broker = Broker()
    sender, size = sender_to(broker), MAX_WAITING_BYTES // 4
    streams = [asyncio.ensure_future(send(sender, *[bytes(size)] * 100)) for _ in range(3)]
    await turns()
    assert len(broker.messages) == 1
    waiting = sender._waiting["g"]
    assert waiting.size <= MAX_WAITING_BYTES + 3 * size, "one chunk more for each stream"
    assert not any(stream.done() for stream in streams)
    broker.confirm(1000)
    await asyncio.gather(*streams)
    await sender.confirmed("g")
    assert sum(len(frames) for _, frames in broker.messages) == 300
    assert sender._waiting == {}


async def test_a_cancelled_stream_stops_no_other():
    broker = Broker()
    sender = sender_to(broker)
    gone, stays = [asyncio.ensure_future(sender.reply_last("g", frame)) for frame in (b"a", b"b")]
    await turns()
    gone.cancel()
    await turns()
    broker.confirm()
    await stays
    assert gone.cancelled()


async def test_a_large_answer_comes_after_the_chunks_before_it():
    broker = Broker()
    broker.confirm(3)
    sender = sender_to(broker)
    await send(sender, b"a1", bytes(envelope.LARGE + 1), b"a3")
    await sender.confirmed("g")
    assert [len(frames[0]) for _, frames in broker.messages] == [2, envelope.LARGE + 1, 2]


async def test_a_message_that_fails_stops_no_stream():
    broker = Broker()
    broker.fail = ValueError("unexpected")
    broker.confirm(2)
    sender = sender_to(broker)
    await sender.reply_last("g", b"a")
    await sender.reply_last("g", b"b")
    assert len(broker.messages) == 2


async def test_the_streams_of_a_gateway_that_has_ended_learn_it_at_their_next_chunk():
    broker = Broker()
    sender = sender_to(broker)
    await send(sender, b"a1")
    await turns()
    await send(sender, b"b1")
    broker.fail = GatewayGone("g")
    broker.confirm()
    await turns()
    with pytest.raises(GatewayGone):
        await send(sender, b"a2")
    await sender.reply_last("g", b"b-end")  # returns at once
    broker.fail = None
    broker.confirm(2)
    await send(sender, b"c1", reply_to="h")
    await sender.confirmed("h")
    assert broker.messages == [("g", [b"a1"]), ("h", [b"c1"])], "b1 is dropped, and nobody waits for it"
    sender.heard_from("g")
    await sender.reply_last("g", b"d-end")
    assert broker.messages[2:] == [("g", [b"d-end"])]


async def test_a_large_answer_is_not_sent_to_a_gateway_that_has_ended():
    broker = Broker()
    sender = sender_to(broker)
    large = asyncio.ensure_future(send(sender, b"a1", bytes(envelope.LARGE + 1)))
    await turns()
    broker.fail = GatewayGone("g")
    broker.confirm()
    with pytest.raises(GatewayGone):
        await large
    assert broker.messages == [("g", [b"a1"])]


@pytest.mark.parametrize("begun", [True, False])
async def test_stopping_lets_those_that_wait_go_on(begun):
    broker = Broker()
    sender = sender_to(broker)
    waits = asyncio.ensure_future(sender.reply_last("g", b"a"))
    await asyncio.sleep(0)
    if begun:
        await turns()
    await sender.stop()
    await waits
    assert len(broker.messages) == begun
