"""The worker's own unary channel against the server of the gRPC library."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.worker.adapters.grpc_unary import Failed, Gone, UnaryChannel

pytestmark = pytest.mark.integration

METHOD = "/test.Echo/Call"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers with what it is sent; a message that begins with a word does something else."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.waiting = asyncio.Event()
        self.deadlines: list[float | None] = []

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self.call) if details.method == METHOD else None

    async def call(self, message: bytes, context: Any) -> bytes:
        if message == b"wait":
            self.waiting.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if message.startswith(b"fail "):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message[5:].decode())
        if message.startswith(b"late"):
            await asyncio.sleep(0.01)
        return message


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Echo]:
    echo = Echo()
    server = grpc.aio.server(options=UNLIMITED)
    server.add_generic_rpc_handlers((echo,))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield echo
    finally:
        await server.stop(grace=0)


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[UnaryChannel]:
    found = UnaryChannel(str(tmp_path / "grpc"), METHOD)
    yield found
    found.close()


@pytest.mark.parametrize("size", [0, 1, 5, 16_379, 16_380, 65_530, 65_531, 1_000_000, 20_000_000])
async def test_messages_of_any_size_come_back(channel: UnaryChannel, tmp_path: Path, size: int) -> None:
    message = os.urandom(size)
    async with serving(tmp_path / "grpc"):
        assert bytes(await channel.call([message])) == message


async def test_pieces_are_one_message(channel: UnaryChannel, tmp_path: Path) -> None:
    pieces = [os.urandom(size) for size in (10, 0, 300_000, 7, 100_000)]
    async with serving(tmp_path / "grpc"):
        answer = await channel.call([pieces[0], *(memoryview(piece) for piece in pieces[1:])])
        assert bytes(answer) == b"".join(pieces)


async def test_calls_share_the_connection_and_do_not_mix(channel: UnaryChannel, tmp_path: Path) -> None:
    messages = [(b"late" if n % 3 else b"") + os.urandom(n * 977 % 200_000) for n in range(200)]
    async with serving(tmp_path / "grpc"):
        answers = await asyncio.gather(*(channel.call([message]) for message in messages))
    assert [bytes(answer) for answer in answers] == messages


async def test_more_than_a_window_at_once(channel: UnaryChannel, tmp_path: Path) -> None:
    """What does not fit into the server's windows waits, and the calls behind it go on."""
    messages = [os.urandom(3_000_000) for _ in range(8)]
    async with serving(tmp_path / "grpc"):
        answers = await asyncio.gather(*(channel.call([message]) for message in messages))
    assert [bytes(answer) for answer in answers] == messages


async def test_the_servers_error_has_its_code_and_words(channel: UnaryChannel, tmp_path: Path) -> None:
    async with serving(tmp_path / "grpc"):
        for words in ("plain", "ungewöhnlich, 100 % \n zwei Zeilen", "x" * 5_000):
            with pytest.raises(Failed) as failure:
                await channel.call([b"fail " + words.encode()])
            assert failure.value.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert failure.value.message == words
        assert bytes(await channel.call([b"next"])) == b"next"


async def test_a_method_that_is_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path / "grpc"):
        channel = UnaryChannel(str(tmp_path / "grpc"), "/test.Echo/Other")
        with pytest.raises(Failed) as failure:
            await channel.call([b""])
        assert failure.value.code == grpc.StatusCode.UNIMPLEMENTED.value[0]
        channel.close()


async def test_a_cancelled_call_is_cancelled_at_the_server(channel: UnaryChannel, tmp_path: Path) -> None:
    async with serving(tmp_path / "grpc") as echo:
        call = asyncio.create_task(channel.call([b"wait"]))
        await echo.waiting.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()
        async with asyncio.timeout(10):
            await echo.cancelled.wait()
        assert bytes(await channel.call([b"next"])) == b"next"


async def test_a_call_that_takes_too_long_is_cancelled_at_the_server(
    channel: UnaryChannel, tmp_path: Path
) -> None:
    async with serving(tmp_path / "grpc") as echo:
        with pytest.raises(TimeoutError):
            await channel.call([b"wait"], 0.05)
        async with asyncio.timeout(10):
            await echo.cancelled.wait()
        assert bytes(await channel.call([b"next"], 10)) == b"next"


async def test_calls_cancelled_while_they_are_sent(channel: UnaryChannel, tmp_path: Path) -> None:
    """Half a message is left behind; the windows must still be right for those that follow."""
    async with serving(tmp_path / "grpc"):
        for _ in range(20):
            calls = [asyncio.create_task(channel.call([os.urandom(2_000_000)])) for _ in range(3)]
            await asyncio.sleep(0.001)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        message = os.urandom(10_000_000)
        async with asyncio.timeout(20):
            assert bytes(await channel.call([message])) == message


async def test_a_lost_server_and_another_one(channel: UnaryChannel, tmp_path: Path) -> None:
    with pytest.raises(Gone, match="no connection"):
        await channel.call([b""])
    async with serving(tmp_path / "grpc") as echo:
        assert bytes(await channel.call([b"one"])) == b"one"
        call = asyncio.create_task(channel.call([b"wait"]))
        await echo.waiting.wait()
    # An orderly server says so, one that is killed just closes; both are no answer of the model.
    with pytest.raises((Gone, Failed)):
        await call
    async with serving(tmp_path / "grpc"):
        assert bytes(await channel.call([b"two"])) == b"two"


async def test_a_connection_whose_stream_ids_are_used_up(channel: UnaryChannel, tmp_path: Path) -> None:
    async with serving(tmp_path / "grpc"):
        await channel.call([b"first"])
        first = channel._connection
        assert first is not None
        first._next = 2**31 - 5
        for n in range(6):
            assert bytes(await channel.call([b"%d" % n])) == b"%d" % n
        assert channel._connection is not first
        calls = [channel.call([b"late %d" % n]) for n in range(10)]
        assert [bytes(a) for a in await asyncio.gather(*calls)] == [b"late %d" % n for n in range(10)]


@asynccontextmanager
async def refusing(path: Path, refusals: int) -> AsyncIterator[list[int]]:
    """A server that refuses its first calls without having looked at them, and fails all later ones."""
    streams: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)
        writer.write(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        while head := await reader.read(9):
            head += await reader.readexactly(9 - len(head))
            await reader.readexactly(int.from_bytes(head[:3], "big"))
            stream = int.from_bytes(head[5:], "big")
            if head[3] != 1:
                continue
            streams.append(stream)
            if len(streams) <= refusals:
                writer.write(bytes((0, 0, 4, 3, 0)) + stream.to_bytes(4, "big") + (7).to_bytes(4, "big"))
            else:
                block = b"\x88\x10\x0bgrpc-status\x019"
                writer.write(len(block).to_bytes(3, "big") + b"\x01\x05" + stream.to_bytes(4, "big") + block)

    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield streams


async def test_a_refused_call_is_sent_again(channel: UnaryChannel, tmp_path: Path) -> None:
    """By RFC 9113 REFUSED_STREAM says that nothing of the call was processed: the model has no part in it."""
    async with refusing(tmp_path / "grpc", 1) as streams:
        with pytest.raises(Failed) as failure:
            await channel.call([b"x"], 10)
    assert failure.value.code == 9
    assert streams == [1, 3]


async def test_a_server_that_refuses_every_call_is_gone_and_no_failure_of_the_model(
    channel: UnaryChannel, tmp_path: Path
) -> None:
    async with refusing(tmp_path / "grpc", 100) as streams:
        with pytest.raises(Gone, match="did not take"):
            await channel.call([b"x"], 10)
    assert streams == [1, 3, 5]
