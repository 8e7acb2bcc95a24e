"""Keys at a gateway with a real registry: authentication, limits and usage."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.grpc import InferInput

from services.gateway.adapters.store.limit_accounts import ACCOUNT
from tests.conftest import PATIENCE_S
from tests.integration.gateway.conftest import silent
from tests.integration.gateway.process import echo

pytestmark = pytest.mark.integration

INFER = "/v2/models/digits/infer"
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


@pytest.fixture(scope="module")
def gateway_env(registry) -> dict[str, str]:
    return {
        "TIDEGATE_REGISTRY_URL": registry.url,
        "TIDEGATE_USAGE_INTERVAL_S": "0.1",
        "TIDEGATE_LOG_LEVEL": "DEBUG",
    }


@pytest.fixture
def made(registry, client, until):
    """Makes a key and waits until the gateway knows it; ``made.infer(key)`` sends a request with it."""

    class Made:
        async def __call__(self, **fields: Any) -> dict[str, Any]:
            key = registry.key(**fields)
            await until(lambda: self.known(key["key"]))
            return key

        async def known(self, key: str) -> bool:
            return (await client.get("/v2/models", headers=bearer(key))).status_code != 401

        async def infer(self, key: str, **more: Any) -> httpx.Response:
            return await client.post(INFER, json=BODY, headers=bearer(key) | more)

    return Made()


def x_grpc(*values: float) -> InferInput:
    row = np.array([values or (1, 2)], np.float32)
    made = InferInput("x", list(row.shape), "FP32")
    made.set_data_from_numpy(row)
    return made


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_loopback_is_open_for_inference_alone(client, worker):
    assert (await client.post(INFER, json=BODY)).status_code == 200
    assert (await client.get("/v2/models")).json()["models"][0]["name"] == "digits"
    for method, path in (("GET", "/api/registry/v1/models"), ("POST", "/api/registry/v1/deploy")):
        answer = await client.request(method, path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


async def test_a_valid_key_is_accepted_and_a_wrong_one_refused(client, worker, made):
    key = (await made())["key"]
    assert (await made.infer(key)).status_code == 200
    wrong = f"{key[:-1]}{'a' if key[-1] != 'a' else 'b'}"
    for credential in (f"Bearer {wrong}", "Bearer", "Bearer tg_none_x", "Basic dTpw", key, "Bearer e.y.J"):
        for path in (INFER, "/v2/models/digits/generate"):
            answer = await client.post(path, json=BODY, headers={"Authorization": credential})
            assert answer.status_code == 401, credential
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["reason"] == "unauthorized"


@pytest.mark.parametrize("length", ["content-length: 90000", "transfer-encoding: chunked"])
async def test_a_large_body_is_refused_at_its_head(gateway, length):
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer tg_none_x\r\n{length}\r\n\r\n"
    writer.write(head.encode())
    assert b"401" in await asyncio.wait_for(reader.readline(), PATIENCE_S)
    writer.close()


async def test_a_revoked_key_is_refused(client, worker, made, registry, until):
    key = await made()
    assert (await made.infer(key["key"])).status_code == 200
    registry("DELETE", f"/v1/keys/{key['id']}")

    async def refused() -> bool:
        return (await made.infer(key["key"])).status_code == 401

    await until(refused, patience_s=2.0 + 3.0)


async def test_a_rotated_key_and_one_that_expires(client, worker, made, registry, until):
    key = await made()
    fresh = registry("POST", f"/v1/keys/{key['id']}/rotate", {"grace_s": 1})
    await until(lambda: made.known(fresh["key"]))

    async def gone(which: str) -> bool:
        return (await made.infer(which)).status_code == 401

    await until(lambda: gone(key["key"]))
    assert (await made.infer(fresh["key"])).status_code == 200
    registry("PATCH", f"/v1/keys/{key['id']}", {"ttl_s": 1})
    await until(lambda: gone(fresh["key"]))


async def test_scopes_and_endpoints(client, worker, made):
    publisher = (await made(scopes=["publish"]))["key"]
    assert (await made.infer(publisher)).json()["reason"] == "forbidden"
    assert (await client.get("/v2/models", headers=bearer(publisher))).status_code == 403
    other = (await made(endpoints=["letters"]))["key"]
    refused = await made.infer(other)
    assert (refused.status_code, refused.json()["reason"]) == (403, "forbidden")
    assert (await client.get("/v2/models", headers=bearer(other))).json() == {"models": []}
    assert (await client.get("/v2/models/digits", headers=bearer(other))).status_code == 403
    assert (await client.get("/v2/models/stats", headers=bearer(other))).json() == {"model_stats": []}
    mine = (await made(endpoints=["digits", "letters"]))["key"]
    assert (await made.infer(mine)).status_code == 200
    assert (await client.get("/v2/models/digits", headers=bearer(mine))).status_code == 200


async def test_more_than_the_rate(client, worker, made):
    key = (await made(rate=0.1, burst=3))["key"]
    began = time.monotonic()
    first = await made.infer(key)
    assert first.status_code == 200
    assert first.headers["ratelimit-policy"] == '"rate";q=3;w=30'
    assert first.headers["ratelimit"] == '"rate";r=2;t=10'
    answers = [await made.infer(key) for _ in range(5)]
    assert [a.status_code for a in answers] == [200, 200, 429, 429, 429]
    refused = answers[-1]
    assert refused.json()["reason"] == "rate_limited"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    full_in = refused.headers["ratelimit"].removeprefix('"rate";r=0;t=').partition(",")[0]
    assert 30 - (time.monotonic() - began) <= int(full_in) <= 30
    streamed = await client.post("/v2/models/digits/generate", json={"x": [1, 2]}, headers=bearer(key))
    assert (streamed.status_code, streamed.headers["retry-after"].isdecimal()) == (429, True)


async def test_a_quota(client, worker, made, registry, until):
    key = await made(day=2, month=100)
    answers = [await made.infer(key["key"]) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert answers[2].json()["reason"] == "quota_exhausted"
    assert 0 < int(answers[2].headers["retry-after"]) <= 86_400
    registry("PATCH", f"/v1/keys/{key['id']}", {"day": 4})

    async def raised() -> bool:
        return (await made.infer(key["key"])).status_code == 200

    await until(raised)


async def test_a_quota_outlives_the_store(client, gateway, worker, made, registry, until):
    key = await made(day=4)
    for _ in range(3):
        assert (await made.infer(key["key"])).status_code == 200
    await until(lambda: _requests(registry, key["id"]) == 3)
    routes = gateway.redis.get("tidegate:routes")
    gateway.redis.flushall()
    gateway.redis.set("tidegate:routes", routes)
    await made.infer(key["key"])
    await until(lambda: gateway.redis.hget(ACCOUNT + key["id"], "day_seeded") == b"1")

    async def refused() -> bool:
        # One more may be admitted before the gateway has read the registry's usage.
        answer = await made.infer(key["key"])
        await asyncio.sleep(0.5)
        return answer.status_code == 429

    await until(refused)
    assert _requests(registry, key["id"]) <= 5


async def test_concurrent_requests(client, worker, made):
    key = (await made(concurrency=2))["key"]
    worker.answer = silent
    waiting = [asyncio.create_task(made.infer(key, **{"X-Request-Timeout-Ms": "5000"})) for _ in range(2)]
    while len(worker.requests) < 2:
        await asyncio.sleep(0.005)
    refused = await made.infer(key)
    assert (refused.status_code, refused.json()["reason"]) == (429, "too_many_concurrent")
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [504, 504]
    worker.answer = echo
    assert (await made.infer(key)).status_code == 200


async def test_a_caller_that_disconnects_frees_its_slot(gateway, client, worker, made, until):
    key = (await made(concurrency=1))["key"]
    worker.answer = silent
    leaving = asyncio.create_task(made.infer(key))
    await until(lambda: worker.requests)
    leaving.cancel()
    worker.answer = echo

    async def free() -> bool:
        return (await made.infer(key)).status_code == 200

    await until(free)


async def test_grpc(gateway, worker, made):
    key = (await made(rate=0.01, burst=1))["key"]
    async with triton.InferenceServerClient(gateway.grpc) as client:
        ask = {"model_name": "digits", "inputs": [x_grpc()]}
        assert await client.is_server_live()
        assert (await client.infer(**ask)).as_numpy("y") is not None, "loopback is open"
        authorized = {"authorization": f"Bearer {key}"}
        assert (await client.infer(**ask, headers=authorized)).as_numpy("y") is not None
        for headers, code in (
            (authorized, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ({"authorization": "Bearer tg_none_x"}, grpc.StatusCode.UNAUTHENTICATED),
        ):
            with pytest.raises(triton.InferenceServerException) as caught:
                await client.infer(**ask, headers=headers)
            assert caught.value.status() == str(code)
        other = {"authorization": f"Bearer {(await made(endpoints=['letters']))['key']}"}
        with pytest.raises(triton.InferenceServerException, match="may not"):
            await client.get_model_metadata("digits", headers=other)
        assert not (await client.get_model_repository_index(headers=other)).models


async def test_usage_is_counted(gateway, client, worker, made, registry, until):
    key = await made(name="counted")
    for _ in range(3):
        assert (await made.infer(key["key"])).status_code == 200
    bad = await client.post(INFER, json={"inputs": []}, headers=bearer(key["key"]))
    assert bad.status_code == 400
    assert (await made.infer(key["key"])).status_code == 200
    missing = await client.post("/v2/models/none/infer", json=BODY, headers=bearer(key["key"]))
    assert missing.status_code == 404
    async with triton.InferenceServerClient(gateway.grpc) as stub:
        await stub.infer("digits", [x_grpc()], headers={"authorization": f"Bearer {key['key']}"})
    generated = await client.post(
        "/v2/models/digits/generate", json={"x": [1, 2]}, headers=bearer(key["key"])
    )
    assert generated.status_code == 200

    await until(lambda: _requests(registry, key["id"]) == 6)
    (row,) = registry("GET", f"/v1/usage?principal={key['id']}")["items"]
    assert (row["endpoint"], row["principal_name"], row["failed"]) == ("digits", "counted", 0)
    assert row["compute_us"] == 6 * 200
    assert row["received_bytes"] > 4 * len(str(BODY)) * 0.8
    assert row["sent_bytes"] > 0


async def test_all_apis_count_usage_alike(gateway, client, worker, made, registry, until):
    key = await made()
    for x, status, code in (([1] * 3, 400, "INVALID_ARGUMENT"), ([1, 2], 504, "DEADLINE_EXCEEDED")):
        worker.answer = silent
        wanted = {"inputs": [BODY["inputs"][0] | {"shape": [1, len(x)], "data": x}]}
        for door, body in (("infer", wanted), ("generate", {"x": x}), ("generate_stream", {"x": x})):
            headers = bearer(key["key"]) | {"X-Request-Timeout-Ms": "200"}
            answer = await client.post(f"/v2/models/digits/{door}", json=body, headers=headers)
            assert answer.status_code == status, (door, answer.text)
        async with triton.InferenceServerClient(gateway.grpc) as stub:
            headers = {"authorization": f"Bearer {key['key']}", "x-request-timeout-ms": "200"}
            with pytest.raises(triton.InferenceServerException) as caught:
                await stub.infer("digits", [x_grpc(*x)], headers=headers)
            assert caught.value.status() == f"StatusCode.{code}"
    worker.answer = echo
    assert (await made.infer(key["key"])).status_code == 200
    await until(lambda: _requests(registry, key["id"]) >= 5)
    (row,) = registry("GET", f"/v1/usage?principal={key['id']}")["items"]
    assert (row["requests"], row["failed"]) == (5, 4), "of those that were refused none counts"


def _requests(registry, principal: str) -> int:
    rows = registry("GET", f"/v1/usage?principal={principal}&by=principal")["items"]
    return rows[0]["requests"] if rows else 0
