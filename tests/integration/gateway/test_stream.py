"""A stream at the gateway: chunks in order, duplicates, gaps, restarts and deadlines."""

from __future__ import annotations

import asyncio
import struct
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from services.gateway.application.inference import chunk_buffer as chunks
from services.gateway.application.inference.core import InferenceCore
from services.gateway.domain.contract import Decoded
from services.gateway.domain.replica_fleet import UNKNOWN_FLEET
from services.gateway.domain.routing import parse_table
from tests.conftest import PATIENCE_S
from tidegate.kernel.errors import BadRequest, DeadlinePassed, ModelFailed, Overloaded, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Tensor
from tidegate.kernel.protocol.tensors import DATATYPES

pytestmark = pytest.mark.integration

X = (Tensor("x", DATATYPES["FP32"], (2,)),)
KEY = envelope.call_key(X, (), {})
RESULT = envelope.result_key((Tensor("y", DATATYPES["INT32"], ()),))


def decode(_) -> Decoded:
    return Decoded("", 1, KEY, [bytes(8)], None, False)


def chunk(request, seq: int, attempt: int | None = None, size: int = 4) -> bytes:
    data = struct.pack("<i", seq) + bytes(size - 4)
    attempt = request.attempt if attempt is None else attempt
    return envelope.reply_frame(request.id, attempt, 0, RESULT, [data], status=envelope.CHUNK, seq=seq)


def end(request, count: int, attempt: int | None = None) -> bytes:
    return envelope.end_frame(request.id, request.attempt if attempt is None else attempt, count)


class Model:
    """The worker's end of a stream: it has the request and sends the replies."""

    def __init__(self, peer, until) -> None:
        self._peer, self._until = peer, until
        peer.answer = lambda _: None

    async def asked(self, number: int = 0):
        await self._until(lambda: len(self._peer.requests) > number)
        return self._peer.requests[number]

    async def send(self, *frames: bytes) -> None:
        (delivery, *_) = self._peer.deliveries
        body = envelope.pack(envelope.REPLIES, list(frames))
        await self._peer.connection.channel.publish(body, routing_key=delivery.reply_to)

    @property
    def cancelled(self):
        return self._peer.cancelled


@pytest.fixture
def model(peer, until) -> Model:
    return Model(peer, until)


@pytest.fixture
def core(table, deployment):
    """``core(dispatcher)`` returns the gateway's core with the test's Deployment."""

    def made(dispatcher, **fields) -> InferenceCore:
        routes = SimpleNamespace(table=parse_table(table(deployment, **fields)))
        return InferenceCore(routes, dispatcher, SimpleNamespace(fleet=lambda _: UNKNOWN_FLEET))  # type: ignore[arg-type]

    return made


@pytest.fixture
async def stream(dispatch, core):
    """``stream(timeout_ms)`` returns a stream of the test's Deployment."""
    dispatcher = await dispatch()
    return lambda timeout_ms=20_000: core(dispatcher).stream("digits", "", timeout_ms, decode, b"t")


def number(answer) -> int:
    return struct.unpack_from("<i", answer.reply.data[0])[0]


async def collect(stream) -> list[int]:
    return [number(answer) async for answer in stream]


async def drain(answers, found: list[int]) -> None:
    async for answer in answers:
        found.append(number(answer))  # noqa: PERF401  # what was found is looked at when this fails


async def test_chunks_in_order(stream, model):
    task = asyncio.create_task(collect(stream()))
    request = await model.asked()
    assert request.flags & envelope.STREAM
    for seq in range(5):
        await model.send(chunk(request, seq))
    await model.send(end(request, 5))
    assert await task == [0, 1, 2, 3, 4]
    assert model.cancelled == []


async def test_each_is_there_before_the_next_is_made(stream, model):
    async with aclosing(stream()) as answers:
        first = asyncio.ensure_future(anext(answers))
        request = await model.asked()
        for seq in range(3):
            await model.send(chunk(request, seq))
            assert number(await first) == seq
            first = asyncio.ensure_future(anext(answers))
        await model.send(end(request, 3))
        with pytest.raises(StopAsyncIteration):
            await first


async def test_duplicates_are_dropped(stream, model):
    task = asyncio.create_task(collect(stream()))
    request = await model.asked()
    await model.send(chunk(request, 0), chunk(request, 0), chunk(request, 1))
    await model.send(chunk(request, 0), chunk(request, 1), chunk(request, 2), end(request, 3))
    assert await task == [0, 1, 2]


async def test_an_empty_stream(stream, model):
    task = asyncio.create_task(collect(stream()))
    await model.send(end(await model.asked(), 0))
    assert await task == []


async def test_one_plain_answer_is_a_stream_too(stream, model):
    task = asyncio.create_task(collect(stream()))
    request = await model.asked()
    await model.send(envelope.reply_frame(request.id, 0, 0, RESULT, [struct.pack("<i", 7)]))
    assert await task == [7]


async def test_a_gap_is_an_error_and_cancels(stream, model, until):
    task = asyncio.create_task(collect(stream()))
    request = await model.asked()
    await model.send(chunk(request, 0), chunk(request, 2))
    with pytest.raises(Unavailable, match="a part of the stream was lost") as caught:
        await task
    assert (type(caught.value), caught.value.reason) == (Unavailable, "unavailable")
    await until(lambda: request.id in model.cancelled)


async def test_a_failure_in_the_middle(stream, model):
    answers = stream()
    first = asyncio.ensure_future(anext(answers))
    request = await model.asked()
    failure = envelope.failure_frame(request.id, 0, "model_failed", "out of tea")
    await model.send(chunk(request, 0), failure)
    assert number(await first) == 0
    with pytest.raises(ModelFailed, match="out of tea"):
        await anext(answers)


async def test_a_restart_after_the_first_chunk_fails_the_stream(stream, model, until):
    """Its worker died. The second attempt would repeat chunks that the caller has."""
    answers = stream()
    first = asyncio.ensure_future(anext(answers))
    request = await model.asked()
    await model.send(chunk(request, 0))
    await first
    await model.send(chunk(request, 0, attempt=1))
    with pytest.raises(Unavailable, match="in the middle"):
        await anext(answers)
    await until(lambda: request.id in model.cancelled)


async def test_a_restart_before_the_first_chunk_goes_unnoticed(stream, model):
    task = asyncio.create_task(collect(stream()))
    request = await model.asked()
    await model.send(chunk(request, 0, attempt=1), chunk(request, 1, attempt=1))
    await model.send(chunk(request, 2, attempt=0), chunk(request, 0, attempt=0))
    await model.send(end(request, 2, attempt=1))
    assert await task == [0, 1]


async def test_closing_the_stream_cancels_it(stream, model, until):
    async with aclosing(stream()) as answers:
        first = asyncio.ensure_future(anext(answers))
        request = await model.asked()
        await model.send(chunk(request, 0))
        await first
    await until(lambda: model.cancelled == [request.id])
    await model.send(chunk(request, 1))
    await until(lambda: model.cancelled == [request.id] * 2, "who still sends is told again")


async def test_cancelled_while_it_waits(stream, model, until):
    task = asyncio.create_task(collect(stream()))
    request = await model.asked()
    task.cancel()
    await until(lambda: request.id in model.cancelled)


async def test_the_deadline_of_the_first_chunk(stream, model, until):
    with pytest.raises(DeadlinePassed, match="the first part"):
        await collect(stream(3_000))
    request = await model.asked()
    await until(lambda: request.id in model.cancelled)


async def test_the_deadline_between_two(stream, model, until):
    answers = stream(6_000)
    first = asyncio.ensure_future(anext(answers))
    request = await model.asked()
    await model.send(chunk(request, 0))
    await first
    for seq in (1, 2, 3):  # longer than the deadline in total
        await asyncio.sleep(2.5)
        await model.send(chunk(request, seq))
        assert number(await anext(answers)) == seq
    with pytest.raises(DeadlinePassed, match="the next part"):
        await anext(answers)
    await until(lambda: request.id in model.cancelled)


@pytest.mark.parametrize(
    ("count", "size", "kept"), [(chunks.MAX_CHUNKS + 5, 4, chunks.MAX_CHUNKS), (12, 2**20, 8)]
)
async def test_a_slow_reader_is_disconnected(stream, model, until, count, size, kept):
    answers = stream()
    first = asyncio.ensure_future(anext(answers))
    request = await model.asked()
    await model.send(chunk(request, 0))
    await first
    for seq in range(1, count + 1):
        await model.send(chunk(request, seq, size=size))
    await until(lambda: request.id in model.cancelled)
    found: list[int] = []
    with pytest.raises(Overloaded, match="too slowly") as caught:
        await drain(answers, found)
    assert caught.value.reason == "slow_reader"
    assert found == list(range(1, kept + 1)), "buffered chunks are still delivered"


async def test_a_stream_counts_as_one_request(dispatch, core, model, route):
    """A chunk does not settle a request; the end does."""
    dispatcher = await dispatch()
    answers = core(dispatcher).stream("digits", "", 20_000, decode)
    first = asyncio.ensure_future(anext(answers))
    request = await model.asked()
    await model.send(chunk(request, 0))
    await first
    load = dispatcher.queue_of(route()).load
    assert (load.outstanding, load.completed) == (1, 0)
    await model.send(end(request, 1))
    with pytest.raises(StopAsyncIteration):
        await anext(answers)
    assert (load.outstanding, load.completed) == (0, 1)


async def test_a_single_answer_of_a_decoupled_model_is_refused(dispatch, core, table, deployment):
    signature = table(deployment)["deployments"][deployment]["signature"] | {"decoupled": True}
    asked = core(await dispatch(), signature=signature)
    with pytest.raises(BadRequest, match=r"/generate_stream.*ModelStreamInfer"):
        await asked.infer("digits", "", 1000, decode)


async def test_a_connection_lost_before_the_first_chunk(dispatch, core, line, model, until):
    """The request is sent again as another attempt, so that two runs cannot mix."""
    await_core = core(await dispatch(line.url))
    task = asyncio.create_task(collect(await_core.stream("digits", "", 20_000, decode)))
    request = await model.asked()
    line.cut()
    again = await model.asked(1)
    assert (again.id, again.attempt) == (request.id, request.attempt + 1)
    await model.send(chunk(request, 0), chunk(request, 1))
    await model.send(chunk(again, 0), end(again, 1))
    assert await task == [0]


async def test_a_connection_lost_in_the_middle(dispatch, core, line, model, peer, until):
    """The stream goes on, and is not started again."""
    dispatcher = await dispatch(line.url)
    answers = core(dispatcher).stream("digits", "", 20_000, decode)
    first = asyncio.ensure_future(anext(answers))
    request = await model.asked()
    await model.send(chunk(request, 0))
    await first
    line.cut()
    await until(lambda: dispatcher.back.channel is None and dispatcher.out.channel is None)
    await dispatcher.back.wait_up(PATIENCE_S)
    await dispatcher.out.wait_up(PATIENCE_S)
    await model.send(chunk(request, 1), end(request, 2))
    assert await collect(answers) == [1]
    assert len(peer.requests) == 1
