"""Inference over gRPC: cancelled calls, lost and closed connections, refused streams."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.worker.adapters.triton_client import TritonClient
from tests.conftest import PATIENCE_S
from tidegate.kernel.errors import BadRequest, DeadlinePassed, ModelFailed, Unavailable
from tidegate.kernel.triton_protocol import ModelInferRequest, ModelInferResponse, pb

pytestmark = pytest.mark.integration

LARGE = 9_000_000
SERVICE = "inference.GRPCInferenceService"


class Server:
    """A server that returns the id of each request. Ids such as "wait" make it do something else."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.waiting = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        methods = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(
                self.infer,
                request_deserializer=ModelInferRequest.FromString,
                response_serializer=ModelInferResponse.SerializeToString,
            ),
            "ServerLive": grpc.unary_unary_rpc_method_handler(
                self.live, response_serializer=pb.ServerLiveResponse.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def live(self, message: bytes, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def infer(self, message: Any, context: Any) -> Any:
        if message.id == "wait":
            self.waiting.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        code, _, text = message.id.partition(" ")
        if text:
            await context.abort(grpc.StatusCode[code], text)
        if message.id.startswith("late"):
            await asyncio.sleep(0.01)
        return ModelInferResponse(id=message.id, raw_output_contents=message.raw_input_contents)


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Server]:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server, handler = grpc.aio.server(options=unlimited), Server()
    server.add_generic_rpc_handlers((handler.handler(),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield handler
    finally:
        await server.stop(grace=0)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[TritonClient]:
    found = TritonClient(f"unix:{tmp_path / 'grpc'}")
    yield found
    await found.close()


def request(id_: str, data: bytes = b"") -> Any:
    return ModelInferRequest(id=id_, raw_input_contents=[data])


async def test_pieces_are_one_message_of_any_size(client: TritonClient, tmp_path: Path) -> None:
    async with serving(tmp_path / "grpc"):
        for size in (0, 1, 70_000, 20_000_000):
            message = request("x", bytes(size)).SerializeToString()
            pieces = [message[:3], memoryview(message)[3:1000], b"", memoryview(message)[1000:]]
            answer = await client.infer_raw(pieces)
            assert answer.raw_output_contents == [bytes(size)]


async def test_calls_at_the_same_time_do_not_mix(client: TritonClient, tmp_path: Path) -> None:
    ids = [f"{'late' if n % 3 else 'soon'}{n}" for n in range(200)]
    async with serving(tmp_path / "grpc"):
        answers = await asyncio.gather(*(client.infer(request(id_, bytes(1000))) for id_ in ids))
    assert [answer.id for answer in answers] == ids


async def test_an_error_keeps_its_message(client: TritonClient, tmp_path: Path) -> None:
    async with serving(tmp_path / "grpc"):
        for text in ("plain", "ungewöhnlich, 100 % \n zwei Zeilen", "x" * 5_000):
            with pytest.raises(BadRequest) as failure:
                await client.infer(request(f"INVALID_ARGUMENT {text}"))
            assert failure.value.message == text
        with pytest.raises(ModelFailed, match="a queue is full"):
            await client.infer(request("UNAVAILABLE a queue is full"))
        assert (await client.infer(request("next"))).id == "next"


async def test_a_cancelled_call_is_cancelled_at_the_server(client: TritonClient, tmp_path: Path) -> None:
    async with serving(tmp_path / "grpc") as server:
        call = asyncio.create_task(client.infer(request("wait")))
        await server.waiting.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()
        async with asyncio.timeout(PATIENCE_S):
            await server.cancelled.wait()
        assert (await client.infer(request("next"))).id == "next"


async def test_a_call_that_takes_too_long_is_cancelled_at_the_server(
    client: TritonClient, tmp_path: Path
) -> None:
    async with serving(tmp_path / "grpc") as server:
        assert (await client.infer(request("first"), 10)).id == "first"
        limit_s = 0.2
        while not server.waiting.is_set():  # on a busy machine the time may end before the call arrives
            with pytest.raises(DeadlinePassed):
                await client.infer(request("wait"), limit_s)
            limit_s = min(2 * limit_s, PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            await server.cancelled.wait()
        assert (await client.infer(request("next"), 10)).id == "next"


async def test_calls_cancelled_while_they_are_sent(client: TritonClient, tmp_path: Path) -> None:
    async with serving(tmp_path / "grpc"):
        for _ in range(20):
            calls = [asyncio.create_task(client.infer(request("x", bytes(2_000_000)))) for _ in range(3)]
            await asyncio.sleep(0.001)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        async with asyncio.timeout(PATIENCE_S):
            assert (await client.infer(request("next", bytes(10_000_000)))).id == "next"


async def test_a_lost_server_is_unavailable(client: TritonClient, tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        await client.infer(request("nobody there"))
    client = TritonClient(f"unix:{tmp_path / 'grpc'}")
    async with serving(tmp_path / "grpc") as server:
        call = asyncio.create_task(client.infer(request("wait")))
        await server.waiting.wait()
    with pytest.raises(Unavailable):
        await call
    await client.close()


async def test_a_client_that_is_closed_under_a_call(client: TritonClient, tmp_path: Path) -> None:
    """The call fails; the task that made it is not cancelled."""
    async with serving(tmp_path / "grpc") as server:
        call = asyncio.create_task(client.infer(request("wait")))
        await server.waiting.wait()
        await client.close()
        with pytest.raises(Unavailable, match="closed"):
            await call
        with pytest.raises(Unavailable, match="closed"):
            await client.infer(request("next"))


@asynccontextmanager
async def proxied(path: Path, server: Path) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """Forward the connections at ``path`` to ``server``; yield their ends, to cut them."""
    open_: list[asyncio.StreamWriter] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, out = await asyncio.open_unix_connection(server)
        open_.extend((writer, out))
        await asyncio.gather(forward(reader, out), forward(back, writer), return_exceptions=True)

    async with await asyncio.start_unix_server(serve, path):
        yield open_


async def test_a_cut_connection_is_no_failure_of_the_model(client: TritonClient, tmp_path: Path) -> None:
    """The server is alive, so only the library's message shows that the connection was cut."""
    async with (
        serving(tmp_path / "server") as server,
        proxied(tmp_path / "grpc", tmp_path / "server") as connections,
    ):
        for _ in range(10):
            server.waiting.clear()
            calls = [
                asyncio.create_task(client.infer(request("wait", bytes(size)))) for size in (0, 9_000_000)
            ]
            await server.waiting.wait()
            calls += [asyncio.create_task(client.infer(request("x", bytes(LARGE)))) for _ in range(3)]
            await asyncio.sleep(0.002)
            for each in connections:
                each.transport.abort()
            connections.clear()
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert not isinstance(outcome, BaseException) or isinstance(outcome, Unavailable), repr(
                    outcome
                )
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    assert (await client.infer(request("next"))).id == "next"
                    break
                except Unavailable:
                    await asyncio.sleep(0.01)


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
                block = b"\x88\x10\x0bgrpc-status\x013"
                writer.write(len(block).to_bytes(3, "big") + b"\x01\x05" + stream.to_bytes(4, "big") + block)

    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield streams


async def test_a_refused_call_is_sent_again(client: TritonClient, tmp_path: Path) -> None:
    """By RFC 9113, REFUSED_STREAM means that nothing of the call was processed."""
    async with refusing(tmp_path / "grpc", 1) as streams:
        with pytest.raises(BadRequest):
            await client.infer(request("x"), 10)
    assert streams == [1, 3]


async def test_a_server_that_refuses_every_call_is_gone_and_no_failure_of_the_model(
    client: TritonClient, tmp_path: Path
) -> None:
    async with refusing(tmp_path / "grpc", 100) as streams:
        with pytest.raises(Unavailable, match="refuses calls"):
            await client.infer(request("x"), 10)
    assert streams == [1, 3, 5]
