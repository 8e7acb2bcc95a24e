"""Requests that cannot be answered in time are refused at the door: why, and when to come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import contextmanager
from typing import Any

import httpx
import orjson
import pytest

from tests.integration.gateway.conftest import silent
from tests.integration.gateway.process import echo
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, ReplicaReport
from tidegate.kernel.store.live import GATEWAY, REPLICA, STATUSES

pytestmark = pytest.mark.integration

MAX_QUEUE = 3
NO_LOAD = {"type": "Loaded", "ok": False, "reason": "LoadFailed", "message": "the file is no model"}
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


@pytest.fixture
async def client(gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as found:
        yield found


async def infer(client: httpx.AsyncClient, model: str, timeout_ms: int = 20_000) -> httpx.Response:
    headers = {"X-Request-Timeout-Ms": str(timeout_ms)}
    return await client.post(f"/v2/models/{model}/infer", json=BODY, headers=headers)


def told(answer: httpx.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json().get("reason", ""), answer.headers.get("retry-after")


async def reply(peer: Any, *frames: bytes) -> None:
    """Answer what the worker was silent about; all of it came from one gateway."""
    await peer.connection.channel.publish(
        envelope.pack(envelope.REPLIES, list(frames)), routing_key=peer.deliveries[-1].reply_to
    )


@contextmanager
def known(gateway: Any, key: str, value: bytes):
    """The store holds this meanwhile."""
    gateway.redis.set(key, value, px=60_000)
    try:
        yield
    finally:
        gateway.redis.delete(key)


async def test_the_queue_is_full(client, add_model, make_peer, until):
    """Nobody is answered yet, so the next is refused; when they are, it is not."""
    model = await add_model(max_queue=MAX_QUEUE)
    async with make_peer(model) as peer:
        await peer.connection.wait_up(20)
        peer.answer = silent
        waiting = [asyncio.create_task(infer(client, model)) for _ in range(MAX_QUEUE)]
        await until(lambda: len(peer.requests) == MAX_QUEUE)
        refused = await infer(client, model)
        assert told(refused) == (503, "overloaded", "1")
        assert f"{MAX_QUEUE} requests wait already, the limit is {MAX_QUEUE}" in refused.json()["error"]

        peer.answer = echo
        await reply(peer, *map(echo, peer.requests))
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * MAX_QUEUE
        assert (await infer(client, model)).status_code == 200
        assert len(peer.requests) == MAX_QUEUE + 1, "the refused one was not queued"


async def test_what_waits_in_other_gateways_counts(gateway, client, add_model, make_peer, until):
    model = await add_model(max_queue=MAX_QUEUE)
    other = GatewayReport("other", time.time(), {model: GatewayLoad(outstanding=MAX_QUEUE)})
    async with make_peer(model) as peer:
        await peer.connection.wait_up(20)

        async def answered(status: int) -> httpx.Response | None:
            answer = await infer(client, model)
            return answer if answer.status_code == status else None

        with known(gateway, GATEWAY + "other", other.to_json()):
            assert told(await until(lambda: answered(503))) == (503, "overloaded", "1")
        await until(lambda: answered(200))


async def test_held_at_no_replica(gateway, client, add_model, make_peer, until):
    """It is said that it is wanted all the same; and whoever finds a replica there is answered."""
    model = await add_model(wakeable=False)
    async with make_peer(model) as peer:
        await peer.connection.wait_up(20)
        refused = await infer(client, model)
        assert told(refused) == (503, "no_capacity", "30")
        assert "held at 0 replicas" in refused.json()["error"]
        await until(lambda: model in peer.demanded)
        assert not peer.requests

        report = ReplicaReport("r", model, 1, "h", 1, "ready")
        with known(gateway, REPLICA + "r", report.to_json()):

            async def answered() -> bool:
                return (await infer(client, model)).status_code == 200

            await until(answered)


async def test_a_model_that_does_not_load(gateway, client, add_model, until):
    model = await add_model()
    with known(gateway, STATUSES, orjson.dumps({model: {"conditions": [NO_LOAD]}})):

        async def refused() -> httpx.Response | None:
            answer = await infer(client, model, 100)  # before that is heard of, nobody answers it
            return answer if answer.status_code == 503 else None

        answer = await until(refused)
        assert told(answer) == (503, "no_capacity", "30")
        assert "the file is no model" in answer.json()["error"]


async def test_a_load_that_fails_ends_the_requests_that_wait(gateway, client, add_model, make_peer, until):
    """At once and with the reason, not when their time is over; one that drains still answers its own."""
    model, draining = await add_model(), await add_model()
    async with make_peer(model) as peer, make_peer(draining) as other:
        for each in (peer, other):
            await each.connection.wait_up(20)
            each.answer = silent
        waiting = [asyncio.create_task(infer(client, name, 3_600_000)) for name in (model, draining)]
        await until(lambda: peer.requests and other.requests)
        status = {"conditions": [NO_LOAD]}
        report = ReplicaReport("r", draining, 1, "h", 1, "draining")
        with (
            known(gateway, REPLICA + "r", report.to_json()),
            known(gateway, STATUSES, orjson.dumps({model: status, draining: status})),
        ):
            answer = await waiting[0]
            assert told(answer) == (503, "no_capacity", "30")
            assert "has no replica: the file is no model" in answer.json()["error"]
            assert not waiting[1].done()
            await reply(other, echo(other.requests[0]))
            assert (await waiting[1]).status_code == 200


async def test_a_deadline_that_passes_while_no_replica_starts_says_why(
    gateway, client, add_model, make_peer, until
):
    model = await add_model()
    status = {"conditions": [NO_LOAD | {"reason": "StartTimeout"}]}
    async with make_peer(model) as peer:
        await peer.connection.wait_up(20)
        peer.answer = silent
        waiting = asyncio.create_task(infer(client, model, 5_000))
        await until(lambda: peer.requests)
        with known(gateway, STATUSES, orjson.dumps({model: status})):
            answer = await waiting
    assert told(answer) == (503, "no_capacity", "30")
    assert "the file is no model" in answer.json()["error"]


async def test_a_start_that_takes_longer_than_the_request_has(gateway, client, add_model, make_peer, until):
    """The last ones took 4 to 9 s. Who has the time is queued, and answered when the replica is there."""
    model = await add_model()
    starts = [{"total_ms": ms} for ms in (4_000.0, 9_000.0, 5_000.0)]
    async with make_peer(model) as peer:
        await peer.connection.wait_up(20)
        peer.answer = silent
        with known(gateway, STATUSES, orjson.dumps({model: {"cold_starts": starts}})):

            async def refused() -> httpx.Response | None:
                answer = await infer(client, model, 100)
                return answer if answer.status_code == 503 else None

            answer = await until(refused)
            assert told(answer) == (503, "cold_start", "9")
            assert "takes 9000 ms more to start, the request has 100 ms" in answer.json()["error"]
            before = len(peer.requests)
            assert told(await infer(client, model, 8_999)) == (503, "cold_start", "9")
            assert len(peer.requests) == before, "it was not queued"
            peer.demanded.clear()

            async def demanded() -> bool:
                return await refused() is not None and model in peer.demanded  # said once a second

            await until(demanded)
            patient = asyncio.create_task(infer(client, model, 20_000))
            await until(lambda: len(peer.requests) > before)
            await reply(peer, echo(peer.requests[-1]))
            assert (await patient).status_code == 200
