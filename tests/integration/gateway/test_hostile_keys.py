"""A gateway that demands a credential looks at it before it keeps a body."""

from __future__ import annotations

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
