"""Calls from pages of allowed and other origins, and the home page without a key."""

from __future__ import annotations

import gzip
import json
import struct
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from tests.integration.gateway.process import echo
from tests.integration.gateway.raw_http import pipelined
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request

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
        "TIDEGATE_HEADER_FORWARD_PATTERN": "x-model-.*|authorization",
        "TIDEGATE_MODEL_CONTROL": "off",
        "TIDEGATE_SHARED_MEMORY": "off",
    }


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


async def test_headers_for_the_model(client, worker, gateway):
    """The pattern of this gateway names two headers, and one of them is a credential."""
    seen: list[dict[str, Any]] = []

    def answer(request: Request) -> bytes:
        seen.append(dict(envelope.read_call_key(request.key).parameters))
        return echo(request)

    worker.answer = answer
    headers = KEY | {"X-Model-Tenant": "blue", "X-Other": "1"}
    body = {**BODY, "parameters": {"seed": 7}}
    assert (await client.post(INFER, json=body, headers=headers)).status_code == 200
    asked = pb.ModelInferRequest(model_name="digits", raw_input_contents=[struct.pack("<2f", 1, 2)])
    asked.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    metadata = [(name.lower(), value) for name, value in headers.items()]
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        await stubs.GRPCInferenceServiceStub(channel).ModelInfer(asked, metadata=metadata)
    worker.answer = echo
    assert seen == [{"x-model-tenant": "blue", "seed": 7}, {"x-model-tenant": "blue"}]


async def test_what_an_operator_has_turned_off(client, worker):
    refused = await client.post("/v2/repository/models/digits/load", headers=KEY)
    assert (refused.status_code, refused.json()["reason"]) == (503, "unavailable")
    assert refused.json()["error"].startswith("explicit model load / unload is not allowed if polling is")
    region = {"key": "/none", "byte_size": 8}
    refused = await client.post("/v2/systemsharedmemory/region/r/register", json=region, headers=KEY)
    assert (refused.status_code, "TIDEGATE_SHARED_MEMORY=local" in refused.json()["error"]) == (400, True)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"shared_memory_region": "r"}}
    refused = await client.post(INFER, json={"inputs": [tensor]}, headers=KEY)
    assert (refused.status_code, "TIDEGATE_SHARED_MEMORY=local" in refused.json()["error"]) == (
        400,
        True,
    )
