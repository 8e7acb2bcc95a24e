"""Several gateway processes behind one port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from tests.integration.gateway.process import echo, wait_ready
from tidegate.kernel.store.live import GATEWAY
from tidegate.stack.ports import free_ports

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


def members(gateway: Any) -> dict[int, psutil.Process]:
    """Return the processes by their ids."""
    return {each.pid: each for each in psutil.Process(gateway.process.pid).children()}


def processes_with(status: str, gateway: Any, port: int) -> int:
    """Return how many of the processes have a socket of this port in this state."""
    count = 0
    for member in members(gateway).values():
        with contextlib.suppress(psutil.NoSuchProcess):  # a process may end meanwhile
            mine = member.net_connections("tcp")
            count += any(each.status == status for each in mine if each.laddr.port == port)
    return count


async def test_each_answers_its_own_callers(gateway, worker, until):
    await until(lambda: processes_with(psutil.CONN_LISTEN, gateway, gateway.grpc_port) == PROCESSES)
    own = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each channel
    async with AsyncExitStack() as stack:
        made = [grpc.aio.insecure_channel(gateway.grpc, options=own) for _ in range(CHANNELS)]
        callers = [stubs.GRPCInferenceServiceStub(await stack.enter_async_context(each)) for each in made]
        await asyncio.gather(*(calls(stub, number) for number, stub in enumerate(callers)))
        await asyncio.gather(*(stream(stub, number) for number, stub in enumerate(callers)))
        assert processes_with(psutil.CONN_ESTABLISHED, gateway, gateway.grpc_port) == PROCESSES


async def member_of(gateway: Any, client: httpx.AsyncClient) -> int:
    """Return the process that has the client's connection."""
    answer = await client.get("/health/live")
    _, port = answer.extensions["network_stream"].get_extra_info("client_addr")
    (found,) = [
        pid
        for pid, member in members(gateway).items()
        if any(each.raddr and each.raddr.port == port for each in member.net_connections("tcp"))
    ]
    return found


async def clients_by_member(gateway: Any, stack: AsyncExitStack) -> dict[int, httpx.AsyncClient]:
    """A client of each member, by its id: the kernel decides who takes a connection, so it takes some."""
    found: dict[int, httpx.AsyncClient] = {}
    for _ in range(100):
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=gateway.url, timeout=20))
        found[await member_of(gateway, client)] = client
        if len(found) == PROCESSES:
            return found
    raise AssertionError(f"all connections are those of {found.keys()}")


async def infer(client: httpx.AsyncClient, *values: float) -> bool:
    """Return True if the answer is right."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": values}]}
    answer = await client.post("/v2/models/digits/infer", json=body)
    return answer.status_code == 200 and answer.json()["outputs"][0]["data"] == list(values)


async def outstanding(gateway: Any, client: httpx.AsyncClient) -> float:
    """Return the requests in flight in all processes, as any of them reports."""
    (family,) = [
        each
        for each in text_string_to_metric_families((await client.get("/metrics")).text)
        if each.name == "tidegate_gateway_outstanding"
    ]
    return sum(each.value for each in family.samples if each.labels == {"deployment": gateway.deployment})


async def test_a_killed_process_is_replaced_and_loses_only_its_own_calls(gateway, worker, until):
    await until(lambda: processes_with(psutil.CONN_LISTEN, gateway, gateway.port) == PROCESSES)
    async with AsyncExitStack() as stack:
        clients = await clients_by_member(gateway, stack)
        (lost, doomed), (kept, client) = clients.items()
        worker.answer = lambda request: None if request.data == [struct.pack("<2f", 6, 6)] else echo(request)
        waits = asyncio.create_task(infer(doomed, 6, 6))
        await until(lambda: worker.requests)

        async def waiting(count: int) -> bool:
            return await outstanding(gateway, client) == count

        await until(lambda: waiting(1))
        members(gateway)[lost].send_signal(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            await waits

        async def replaced() -> bool:
            assert gateway.process.poll() is None, "the parent still runs"
            assert await infer(client, 1, 2), "the other process still answers"
            listening = processes_with(psutil.CONN_LISTEN, gateway, gateway.port)
            return lost not in members(gateway) and listening == PROCESSES

        await until(replaced)
        assert kept in members(gateway)
        await until(lambda: waiting(0), "nobody waits for what the lost one had in hand")

        clients = await clients_by_member(gateway, stack)
        assert clients.keys() == members(gateway).keys()
        for number, each in enumerate(clients.values()):
            assert await infer(each, number, 3)
        # The report of the lost process expires; the others go on.
        await until(lambda: len(gateway.redis.keys(GATEWAY + "*")) == PROCESSES)


def test_processes_end_if_their_parent_is_killed(gateway, rabbitmq_url, valkey_url, tmp_path):
    """They would answer beside the processes of the next gateway."""
    port, grpc_port = free_ports(2)
    environment = os.environ | {
        "TIDEGATE_STATE_DIR": str(tmp_path),
        "TIDEGATE_SERVICE_TOKEN": "token",
        "TIDEGATE_GATEWAY_PORT": str(port),
        "TIDEGATE_GATEWAY_GRPC_PORT": str(grpc_port),
        "TIDEGATE_GATEWAY_WORKERS": str(PROCESSES),
        "TIDEGATE_AMQP_URL": rabbitmq_url,
        "TIDEGATE_REDIS_URL": valkey_url,
    }
    with (tmp_path / "log").open("wb") as log:
        parent = subprocess.Popen(
            [sys.executable, "-m", "services.gateway"], env=environment, stdout=log, stderr=log
        )
    started: list[psutil.Process] = []
    try:
        wait_ready(parent, port, tmp_path / "log")
        started = psutil.Process(parent.pid).children()
        assert len(started) == PROCESSES
        parent.kill()
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not alive
    finally:
        parent.kill()
        parent.wait()
        for each in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
