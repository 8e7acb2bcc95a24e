"""Calls from pages of allowed and other origins, and the home page without a key."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.integration.gateway.raw_http import pipelined

pytestmark = pytest.mark.integration

INFER = "/v2/models/digits/infer"
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
OURS, OTHER = "https://console.example", "https://evil.example"
PAGE = {"Origin": OURS, "Sec-Fetch-Site": "cross-site"}
KEY = {"Authorization": "Bearer token"}
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def gateway_env(registry) -> dict[str, str]:
    return {
        "TIDEGATE_REGISTRY_URL": registry.url,
        "TIDEGATE_AUTH": "required",
        "TIDEGATE_CORS_ORIGINS": f"http://localhost:3000, {OURS}/",
        "TIDEGATE_MAX_BODY_BYTES": "100000",
    }


@pytest.fixture
async def client(gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as found:
        yield found


def preflight(origin: str) -> dict[str, str]:
    return {
        "Origin": origin,
        "Sec-Fetch-Site": "cross-site",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-request-timeout-ms",
    }


@pytest.mark.parametrize("path", [INFER, "/v1/jobs", "/api/registry/v1/deploy"])
async def test_a_preflight_needs_no_key(client, path):
    answer = await client.options(path, headers=preflight(OURS))
    assert (answer.status_code, answer.headers[ALLOWED]) == (200, OURS)
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization,x-request-timeout-ms"
    assert "access-control-allow-credentials" not in answer.headers, "the API uses no cookies"
    refused = await client.options(path, headers=preflight(OTHER))
    assert (refused.status_code, refused.headers.get(ALLOWED)) == (400, None)


def told(answer: httpx.Response) -> tuple[int, list[str]]:
    assert "origin" in answer.headers.get("vary", "").lower()
    exposed = answer.headers["access-control-expose-headers"].lower()
    assert {"server-timing", "retry-after", "x-request-id"} <= set(exposed.split(", "))
    return answer.status_code, answer.headers.get_list(ALLOWED)


@pytest.mark.parametrize(
    ("content", "more", "status"),
    [
        (json.dumps(BODY).encode(), {}, 200),
        (gzip.compress(json.dumps(BODY).encode()), {"Content-Encoding": "gzip"}, 200),
        (b"{", {}, 400),
        (b"{}", {"Authorization": "Bearer tg_no_key"}, 401),
        (b"x" * 100_001, {}, 413),
    ],
    ids=["json", "gzip", "no json", "wrong key", "too large"],
)
async def test_a_page_reads_the_answers_of_inference(client, worker, content, more, status):
    answer = await client.post(INFER, content=content, headers=PAGE | KEY | more)
    assert told(answer) == (status, [OURS])


async def test_a_page_reads_the_answers_of_pipelined_requests(gateway, worker):
    """The ASGI fallback serves the second."""
    content = json.dumps(BODY).encode()
    raw = await pipelined(gateway.port, INFER, [content] * 2, PAGE | KEY)
    assert raw.count(b"HTTP/1.1 200 ") == raw.count(b"access-control-allow-origin: " + OURS.encode()) == 2


async def test_a_page_reads_the_answers_of_all_other_routes(client):
    assert told(await client.get("/v2/models", headers=PAGE | KEY)) == (200, [OURS])
    assert told(await client.get("/v2/models", headers=PAGE)) == (401, [OURS])
    assert told(await client.get("/api/registry/v1/models", headers=PAGE | KEY)) == (200, [OURS])


@pytest.mark.parametrize(("method", "path"), [("POST", INFER), ("GET", "/v2/models")])
async def test_pages_of_other_origins_are_refused(client, worker, method, path):
    body: Any = BODY if method == "POST" else None
    answer = await client.request(method, path, json=body, headers=KEY | {"Origin": OTHER})
    assert (answer.status_code, answer.headers.get(ALLOWED)) == (403, None)
    assert (await client.request(method, path, json=body, headers=KEY)).headers.get(ALLOWED) is None
    assert (await client.request(method, path, json=body, headers=KEY)).status_code == 200


async def test_the_home_page_as_json(client, gateway):
    unknown = (await client.get("/")).json()
    assert (unknown["name"], "models" in unknown) == ("tidegate", False)
    assert "this stack needs a key" in unknown["problem"]
    assert f"{gateway.url}/" in unknown["next"]["command"]
    wrong = await client.get("/", headers={"Authorization": "Bearer nonsense"})
    assert (wrong.status_code, "does not know the key" in wrong.json()["problem"]) == (200, True)
    known = (await client.get("/", headers=KEY)).json()
    assert known["models"] == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]
    assert known["next"]["command"] == f"curl {gateway.url}/v2/models/digits"


async def test_a_browser_gets_a_page(client):
    answer = await client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "digits" not in answer.text
    known = await client.get("/", headers=KEY | {"Accept": "text/html"})
    assert "<td>digits" in known.text
    assert "http" not in known.text.replace(str(client.base_url).rstrip("/"), ""), (
        "it loads nothing from elsewhere"
    )
