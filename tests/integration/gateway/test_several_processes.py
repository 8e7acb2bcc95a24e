"""Several gateway processes behind one port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import httpx
import orjson
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from tests.conftest import PATIENCE_S
from tests.integration.gateway.process import echo, wait_ready
from tidegate.kernel.store.live import GATEWAY, ROUTES, ROUTES_CHANGED
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
        client = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=gateway.url, timeout=PATIENCE_S, limits=httpx.Limits(keepalive_expiry=600)
            )
        )
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


WEIGHTS = {"1": 90, "2": 9, "3": 1}
BLOCKS = 5
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


@pytest.fixture
async def versions(fresh, make_peer) -> AsyncIterator[dict[str, str]]:
    """Start a worker for each of three Deployments; they are values, by version."""
    names = {version: fresh(f"v{version}") for version in WEIGHTS}
    async with AsyncExitStack() as stack:
        for name in names.values():
            peer = await stack.enter_async_context(make_peer(name))
            await peer.connection.wait_up(PATIENCE_S)
        yield names


def publish(gateway: Any, table: Any, versions: dict[str, str], endpoints: dict[str, dict[str, Any]]) -> None:
    """Publish a table in which these endpoints have weights (by version), and further fields."""
    raw = orjson.loads(gateway.redis.get(ROUTES))
    raw["n"] += 1
    for version, name in versions.items():
        raw["deployments"] |= table(name, version=int(version))["deployments"]
    for endpoint, fields in endpoints.items():
        targets = [{"deployment": versions[v], "weight": w} for v, w in fields["weights"].items()]
        rest = {"versions": versions, "default_timeout_ms": 120_000}
        raw["endpoints"][endpoint] = {"targets": targets, **rest, "sticky": fields.get("sticky")}
    gateway.redis.set(ROUTES, orjson.dumps(raw))
    gateway.redis.publish(ROUTES_CHANGED, b"")


async def known(clients: list[httpx.AsyncClient], endpoint: str) -> bool:
    found = [(await client.get(f"/v2/models/{endpoint}")).status_code == 200 for client in clients]
    return all(found)


async def answered(client: httpx.AsyncClient, endpoint: str, headers: dict[str, str] | None = None) -> str:
    """Return the version that answered."""
    answer = await client.post(f"/v2/models/{endpoint}/infer", json=BODY, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model_version"])


async def test_weights_are_exact_in_every_hundred_requests_of_a_process(
    gateway, table, versions, fresh, until
):
    name = fresh("shares")
    async with AsyncExitStack() as stack:
        clients = await clients_by_member(gateway, stack)
        publish(gateway, table, versions, {name: {"weights": WEIGHTS}})
        await until(lambda: known(list(clients.values()), name))

        async def blocks(client: httpx.AsyncClient) -> list[Counter[str]]:
            return [Counter([await answered(client, name) for _ in range(100)]) for _ in range(BLOCKS)]

        found = await asyncio.gather(*map(blocks, clients.values()))
    assert found == [[WEIGHTS] * BLOCKS] * PROCESSES


async def test_no_sticky_key_moves_while_other_weights_change(gateway, table, versions, fresh, until):
    name, other = fresh("sticky"), fresh("other")
    sticky = {"weights": {"1": 50, "2": 30, "3": 20}, "sticky": {"by": "header", "name": "X-User"}}
    first: dict[int, str] = {}
    async with AsyncExitStack() as stack:
        clients = list((await clients_by_member(gateway, stack)).values())
        publish(gateway, table, versions, {name: sticky, other: {"weights": {"1": 1}}})
        await until(lambda: known(clients, other))
        for turn in range(6):
            for key in range(60):
                version = await answered(clients[(key + turn) % PROCESSES], name, {"X-User": str(key)})
                assert first.setdefault(key, version) == version
            weights = ({"1": 1, "3": 99}, {"2": 100}, {"1": 5, "2": 5})[turn % 3]
            publish(gateway, table, versions, {other: {"weights": weights}})
    assert set(first.values()) == set(WEIGHTS)


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
        _, alive = psutil.wait_procs(started, timeout=PATIENCE_S)
        assert not alive
    finally:
        parent.kill()
        parent.wait()
        for each in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
