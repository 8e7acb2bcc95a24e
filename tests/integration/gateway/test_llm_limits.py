"""Limits of tokens at a gateway process: what a caller sees, and what is counted."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S

# The names of fixtures.
from tests.integration.gateway.test_openai import (  # noqa: F401
    CHAT,
    HELLO,
    client,
    delta,
    engine,
    gateway_env,
    gateway_route,
    read,
)

pytestmark = pytest.mark.integration


class Caller:
    """A caller with a key of its own."""

    def __init__(self, key: dict[str, Any], url: str, anybody: httpx.AsyncClient) -> None:
        self.id = key["id"]
        self.headers = {"Authorization": f"Bearer {key['key']}"}
        self.http = httpx.AsyncClient(base_url=url, headers=self.headers, timeout=PATIENCE_S)
        self._anybody = anybody

    async def known(self) -> None:
        """Wait until the gateway knows the key."""
        async with asyncio.timeout(PATIENCE_S):
            while (await self.http.get("/v1/models")).status_code == 401:
                await asyncio.sleep(0.02)

    async def page(self) -> list[str]:
        """Return the lines of the gateway's metrics page about language models."""
        lines = (await self._anybody.get("/metrics")).text.splitlines()
        return [line for line in lines if line.startswith("tidegate_llm_")]

    async def metric(self, name: str, **labels: str) -> float:
        """Return a sample of the gateway's metrics page; 0 if there is none."""
        for line in await self.page():
            if line.startswith(f"{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rpartition(" ")[2])
        return 0.0


@pytest.fixture
async def caller(registry, gateway, client):  # noqa: F811
    made: list[Caller] = []

    async def make(**limits: Any) -> Caller:
        found = Caller(registry.key(scopes=["infer"], **limits), gateway.url, client)
        made.append(found)
        await found.known()
        return found

    yield make
    for each in made:
        await each.http.aclose()


async def answered(caller: Caller, engine: Any, at: int, body: dict[str, Any], **meta: Any) -> httpx.Response:  # noqa: F811
    """Return the whole answer to a request, after the engine's only event."""
    asking = asyncio.create_task(caller.http.post(CHAT, json=body))
    request, _ = await engine.asked(at)
    await engine.send(request, {"id": "c", "model": "x"}, **meta)
    await engine.end(request)
    return await asking


async def test_a_caller_sees_its_limits_and_is_refused_beyond_them(caller, engine):  # noqa: F811
    robot = await caller(tokens_per_minute=100, rate=0.001, burst=60)
    answer = await answered(robot, engine, 0, {**HELLO, "max_tokens": 70}, usage=[10, 50, 0])
    assert answer.status_code == 200
    seen = answer.headers
    assert '"tokens-minute";q=100;w=60;qu="tokens"' in seen["ratelimit-policy"]
    assert '"tokens-minute";r=40;t=61' in seen["ratelimit"], "the engine's 60 count, not the estimate"
    assert seen["x-ratelimit-limit-tokens"] == "100"
    assert seen["x-ratelimit-remaining-tokens"] == "40"
    assert seen["x-ratelimit-reset-tokens"] == "1m1s"
    assert (seen["x-ratelimit-limit-requests"], seen["x-ratelimit-remaining-requests"]) == ("60", "59")
    refused = await robot.http.post(CHAT, json={**HELLO, "max_tokens": 60})
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (429, "tokens", "rate_limit_exceeded")
    assert "of 100 tokens per minute" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert refused.headers["x-ratelimit-limit-tokens"] == "100"


async def test_a_request_that_can_never_fit(caller, engine):  # noqa: F811
    robot = await caller(endpoint_tokens={"digits": {"tokens_per_day": 50}})
    refused = await robot.http.post(CHAT, json={**HELLO, "max_tokens": 100})
    error = refused.json()["error"]
    assert (refused.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["code"] == "request_above_token_limit"
    assert re.search(r"lower max_tokens to \d+ or less", error["message"])
    whole = await answered(robot, engine, 0, {**HELLO, "max_tokens": None}, usage=[6, 40, 0])
    assert whole.status_code == 200, "an answer without a stated limit takes what is left"


async def test_a_stream_that_its_caller_leaves_is_charged_what_it_used(caller, engine, registry, until):  # noqa: F811
    robot = await caller(tokens_per_minute=300)
    first = "tidegate_llm_time_to_first_token_seconds_count"
    before = await robot.metric(first, endpoint="digits")
    reading = asyncio.create_task(read(robot.http, CHAT, {**HELLO, "max_tokens": 200, "stream": True}))
    request, _ = await engine.asked()
    await engine.send(request, delta("a"), usage=[12, 30, 4])
    async with asyncio.timeout(PATIENCE_S):
        while await robot.metric(first, endpoint="digits") == before:
            await asyncio.sleep(0.02)
    reading.cancel()
    await until(lambda: set(engine.cancelled) == {request.id})  # a late chunk causes another cancel

    def usage() -> list[int]:
        items = registry("GET", f"/v1/usage?principal={robot.id}")["items"]
        return [item["tokens_in"] + item["tokens_out"] for item in items]

    await until(lambda: usage() == [42])
    answer = await answered(robot, engine, 1, {**HELLO, "max_tokens": 200}, usage=[12, 0, 0])
    assert answer.status_code == 200, "the rest of the first charge was returned"
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(300 - 42 - 12)
    page = "tidegate_llm_tokens_total"
    assert await robot.metric(page, endpoint="digits", band="normal", kind="answer") >= 30
    assert not any(robot.id in line for line in await robot.page()), "no key is a label"
