"""A gateway that requires a credential checks it before it keeps a body."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.integration.gateway.test_hostile import BODY, INFER, KNOWN, Held, exchange, infer
from tests.integration.kernel.http_server import answers

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def gateway_env(registry) -> dict[str, str]:
    return {
        "TIDEGATE_AUTH": "required",
        "TIDEGATE_REGISTRY_URL": registry.url,
        "TIDEGATE_HTTP_BODY_GRACE_S": "3600",
        "TIDEGATE_HTTP_CONNECTIONS": "64",
    }


@pytest.mark.parametrize("lines", [[], ["Authorization: Bearer wrong"]])
async def test_before_the_body_has_come(gateway, lines):
    """A body of any size, declared or chunked: the refusal does not wait for its end."""
    held = await Held.open(gateway.port, *lines)
    assert await held.answer() == (401, "unauthorized")
    for size in (10, 30_000, 65_000, 300_000):
        raw = await exchange(gateway.port, infer(b"x" * size, *lines)[:-5])
        assert answers(raw)[0][0] == 401
    head = infer(b"", *lines).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    assert answers(await exchange(gateway.port, head, b"100\r\nabc"))[0][0] == 401
    held.writer.transport.abort()


async def test_the_connection_is_good_for_callers_with_a_credential(gateway, worker):
    async with httpx.AsyncClient(base_url=gateway.url) as client:
        for _ in range(3):
            assert (await client.post(INFER, content=BODY, headers=KNOWN)).status_code == 200
        assert (await client.post(INFER, content=BODY)).status_code == 401


@pytest.mark.parametrize("open_request", [b"", b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"])
async def test_a_flood_does_not_close_the_connection_of_a_caller_with_a_credential(
    gateway, worker, open_request
):
    """Its connection has been idle for longest, but connections of unknown callers are closed first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    for round_ in range(2):
        writer.write(infer(BODY, "Authorization: Bearer token"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), round_
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0]))
        if round_ == 0:
            flood = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(200)]
            for _, hostile in flood:
                hostile.write(open_request)
            await asyncio.sleep(0.2)
    for _, hostile in [(reader, writer), *flood]:
        hostile.transport.abort()
