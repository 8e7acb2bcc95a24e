"""Several gateway processes behind one gRPC port: calls and streams are answered by whichever has them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import psutil
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

pytestmark = pytest.mark.integration

PROCESSES, CHANNELS, EACH = 2, 16, 20


@pytest.fixture(scope="module")
def gateway_env() -> dict[str, str]:
    return {"TIDEGATE_GATEWAY_WORKERS": str(PROCESSES)}


def request(*values: float) -> Any:
    made = pb.ModelInferRequest(model_name="digits", id=str(values))
    made.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    made.raw_input_contents.append(struct.pack("<2f", *values))
    return made


def right(answer: Any, *values: float) -> bool:
    return answer.id == str(values) and list(answer.raw_output_contents) == [struct.pack("<2f", *values)]


async def calls(stub: Any, number: int) -> None:
    for turn in range(EACH):
        assert right(await stub.ModelInfer(request(number, turn)), number, turn)


async def stream(stub: Any, number: int) -> None:
    async def requests() -> AsyncIterator[Any]:
        for turn in range(EACH):
            yield request(-number, turn)

    answers = [each.infer_response async for each in stub.ModelStreamInfer(requests())]
    assert {answer.id for answer in answers} == {str((-number, turn)) for turn in range(EACH)}


def processes_with(gateway: Any, status: str) -> int:
    """How many of the processes have a gRPC socket in this state."""
    members = psutil.Process(gateway.process.pid).children()
    sockets = [
        {each.status for each in member.net_connections("tcp") if each.laddr.port == gateway.grpc_port}
        for member in members
    ]
    return sum(status in found for found in sockets)


async def test_each_answers_its_own_callers(gateway, worker, until):
    await until(lambda: processes_with(gateway, psutil.CONN_LISTEN) == PROCESSES)
    own = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each channel
    async with AsyncExitStack() as stack:
        made = [grpc.aio.insecure_channel(gateway.grpc, options=own) for _ in range(CHANNELS)]
        callers = [stubs.GRPCInferenceServiceStub(await stack.enter_async_context(each)) for each in made]
        await asyncio.gather(*(calls(stub, number) for number, stub in enumerate(callers)))
        await asyncio.gather(*(stream(stub, number) for number, stub in enumerate(callers)))
        assert processes_with(gateway, psutil.CONN_ESTABLISHED) == PROCESSES
