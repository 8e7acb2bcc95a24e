"""Requests that cannot be answered in time are refused, with the reason and Retry-After."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import Any

import httpx
import orjson
import pytest

from tests.conftest import PATIENCE_S
from tests.integration.gateway.conftest import silent
from tests.integration.gateway.process import echo
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, ReplicaReport
from tidegate.kernel.store.live import GATEWAY, REPLICA, STATUSES

pytestmark = pytest.mark.integration

MAX_QUEUE = 3
NO_LOAD = {"type": "Loaded", "ok": False, "reason": "LoadFailed", "message": "the file is no model"}
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


async def infer(client: httpx.AsyncClient, model: str, timeout_ms: int = 120_000) -> httpx.Response:
    headers = {"X-Request-Timeout-Ms": str(timeout_ms)}
    return await client.post(f"/v2/models/{model}/infer", json=BODY, headers=headers)


def told(answer: httpx.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json().get("reason", ""), answer.headers.get("retry-after")


async def reply(peer: Any, *frames: bytes) -> None:
    """Answer the requests that the worker kept; all came from one gateway."""
    await peer.connection.channel.publish(
        envelope.pack(envelope.REPLIES, list(frames)), routing_key=peer.deliveries[-1].reply_to
    )


@contextmanager
def known(gateway: Any, key: str, value: bytes):
    """Wait until the gateway has read this from the store."""
    gateway.redis.set(key, value, px=600_000)
    try:
        yield
    finally:
        gateway.redis.delete(key)


async def test_the_queue_is_full(client, add_model, make_peer, until):
    """With all requests unanswered the next is refused; once they are answered, it is not."""
    model = await add_model(max_queue=MAX_QUEUE)
    async with make_peer(model) as peer:
        await peer.connection.wait_up(PATIENCE_S)
        peer.answer = silent
        waiting = [asyncio.create_task(infer(client, model)) for _ in range(MAX_QUEUE)]
        await until(lambda: len(peer.requests) == MAX_QUEUE)
        refused = await infer(client, model)
        assert told(refused) == (503, "overloaded", "1")
        assert f"{MAX_QUEUE} requests already wait, and the limit is {MAX_QUEUE}" in refused.json()["error"]

        peer.answer = echo
        await reply(peer, *map(echo, peer.requests))
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * MAX_QUEUE
        assert (await infer(client, model)).status_code == 200
        assert len(peer.requests) == MAX_QUEUE + 1, "the refused request was not queued"


async def test_requests_at_other_gateways_fill_the_queue(gateway, client, add_model, make_peer, until):
    model = await add_model(max_queue=MAX_QUEUE)
    other = GatewayReport("other", time.time(), {model: GatewayLoad(outstanding=MAX_QUEUE)})
    async with make_peer(model) as peer:
        await peer.connection.wait_up(PATIENCE_S)

        async def answered(status: int) -> httpx.Response | None:
            answer = await infer(client, model)
            return answer if answer.status_code == status else None

        with known(gateway, GATEWAY + "other", other.to_json()):
            assert told(await until(lambda: answered(503))) == (503, "overloaded", "1")
        await until(lambda: answered(200))


async def test_held_at_no_replica(gateway, client, add_model, make_peer, until):
    """Demand is published all the same, and with a replica there requests are answered."""
    model = await add_model(wakeable=False)
    async with make_peer(model) as peer:
        await peer.connection.wait_up(PATIENCE_S)
        refused = await infer(client, model)
        assert told(refused) == (503, "no_capacity", "30")
        assert "at 0 replicas" in refused.json()["error"]
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
            answer = await infer(
                client, model, 100
            )  # before the gateway knows of the failure, the request times out
            return answer if answer.status_code == 503 else None

        answer = await until(refused)
        assert told(answer) == (503, "no_capacity", "30")
        assert "the file is no model" in answer.json()["error"]


async def test_a_load_that_fails_ends_the_requests_that_wait(gateway, client, add_model, make_peer, until):
    """They fail at once, with the reason. A draining replica still answers its requests."""
    model, draining = await add_model(), await add_model()
    async with make_peer(model) as peer, make_peer(draining) as other:
        for each in (peer, other):
            await each.connection.wait_up(PATIENCE_S)
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
        await peer.connection.wait_up(PATIENCE_S)
        peer.answer = silent
        waiting = asyncio.create_task(infer(client, model, 5_000))
        await until(lambda: peer.requests)
        with known(gateway, STATUSES, orjson.dumps({model: status})):
            answer = await waiting
    assert told(answer) == (503, "no_capacity", "30")
    assert "the file is no model" in answer.json()["error"]


async def test_a_start_that_takes_longer_than_the_timeout(gateway, client, add_model, make_peer, until):
    """The last starts took 4 to 9 s. A request with more time is queued and answered."""
    model = await add_model()
    starts = [{"total_ms": ms} for ms in (4_000.0, 9_000.0, 5_000.0)]
    async with make_peer(model) as peer:
        await peer.connection.wait_up(PATIENCE_S)
        peer.answer = silent
        with known(gateway, STATUSES, orjson.dumps({model: {"cold_starts": starts}})):

            async def refused() -> httpx.Response | None:
                answer = await infer(client, model, 100)
                return answer if answer.status_code == 503 else None

            answer = await until(refused)
            assert told(answer) == (503, "cold_start", "9")
            assert "needs 9000 ms more to start, but the request has 100 ms" in answer.json()["error"]
            before = len(peer.requests)
            assert told(await infer(client, model, 8_999)) == (503, "cold_start", "9")
            assert len(peer.requests) == before, "the request was not queued"
            peer.demanded.clear()

            async def demanded() -> bool:
                return (
                    await refused() is not None and model in peer.demanded
                )  # demand is published once a second

            await until(demanded)
            patient = asyncio.create_task(infer(client, model, 120_000))
            await until(lambda: len(peer.requests) > before)
            await reply(peer, echo(peer.requests[-1]))
            assert (await patient).status_code == 200
