"""Weights and sticky keys through two gateway processes and the real broker."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import orjson
import pytest

from tests.conftest import PATIENCE_S
from tests.integration.gateway.test_several_processes import PROCESSES, clients_by_member
from tidegate.kernel.store.live import ROUTES, ROUTES_CHANGED

pytestmark = pytest.mark.integration

WEIGHTS = {"1": 90, "2": 9, "3": 1}
BLOCKS = 5
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


@pytest.fixture(scope="module")
def gateway_env() -> dict[str, str]:
    return {"TIDEGATE_GATEWAY_WORKERS": str(PROCESSES)}


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
        rest = {"versions": versions, "default_timeout_ms": 20_000}
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
