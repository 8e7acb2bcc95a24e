"""The control plane through the gateway, callers with tokens of an issuer, and an address beyond loopback."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import jwt
import pytest
import tritonclient.grpc.aio as triton
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.protocol.access import metrics_token

pytestmark = pytest.mark.integration

INFER = "/v2/models/digits/infer"
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
ISSUER, AUDIENCE = "https://issuer.example", "tidegate"


class Issuer:
    """An issuer of tokens: its public keys are in a file, its private key is here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.publish("first")

    def publish(self, kid: str) -> None:
        self.kid = kid
        public = json.loads(RSAAlgorithm.to_jwk(self.private.public_key()))
        fresh = self.path.with_suffix(".new")
        fresh.write_text(
            json.dumps({"keys": [public | {"kid": kid, "use": "sig"}, {"kty": "oct", "k": "AA"}]})
        )
        fresh.replace(self.path)

    def token(self, *, key: Any = None, algorithm: str = "RS256", **claims: Any) -> str:
        now = dt.datetime.now(dt.UTC)
        told = {"sub": "u1", "iss": ISSUER, "aud": AUDIENCE, "exp": now + dt.timedelta(minutes=5)}
        told |= {"realm": {"roles": ["scientists"]}} | claims
        return jwt.encode(told, self.private if key is None else key, algorithm, {"kid": self.kid})


@pytest.fixture(scope="module")
def issuer(tmp_path_factory) -> Issuer:
    return Issuer(tmp_path_factory.mktemp("issuer") / "jwks.json")


@pytest.fixture(scope="module")
def gateway_env(registry, issuer) -> dict[str, str]:
    return {
        "TIDEGATE_HOST": "0.0.0.0",
        "TIDEGATE_REGISTRY_URL": registry.url,
        "TIDEGATE_ROUTER_URL": "http://127.0.0.1:9",
        "TIDEGATE_LOG_LEVEL": "DEBUG",
        "TIDEGATE_JWKS_URL": str(issuer.path),
        "TIDEGATE_JWT_ISSUER": ISSUER,
        "TIDEGATE_JWT_AUDIENCE": AUDIENCE,
        "TIDEGATE_JWT_ROLES_CLAIM": "realm.roles",
        "TIDEGATE_JWT_ROLE_SCOPES": '{"scientists": ["infer"], "platform": ["infer", "operate", "publish"]}',
        "TIDEGATE_JWT_LIMITS": '{"trial": {"day": 3}, "*": {"day": 100000}}',
    }


@pytest.fixture
def as_(registry, client, until):
    """``await as_(*scopes)`` returns the headers of a new key, once the gateway knows it."""

    async def made(*scopes: str, name: str = "test") -> dict[str, str]:
        headers = bearer(registry.key(scopes=list(scopes), name=name)["key"])

        async def known() -> bool:
            return (await client.get("/v2/models", headers=headers)).status_code != 401

        await until(known)
        return headers

    return made


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_beyond_loopback_a_credential_is_required(client, gateway, worker):
    for method, path in (
        ("POST", INFER),
        ("POST", "/v2/models/digits/generate"),
        ("GET", "/v2"),
        ("GET", "/v2/models"),
        ("GET", "/v1/jobs"),
        ("POST", "/v1/jobs"),
        ("GET", "/api/registry/v1/models"),
    ):
        answer = await client.request(method, path, json=BODY if method == "POST" else None)
        assert answer.status_code == 401, path
    for path in ("/v2/health/live", "/v2/health/ready", "/health/live"):
        assert (await client.get(path)).status_code == 200, path
    async with triton.InferenceServerClient(gateway.grpc) as stub:
        assert await stub.is_server_live()
        with pytest.raises(triton.InferenceServerException) as caught:
            await stub.get_model_metadata("digits")
        assert caught.value.status() == str(grpc.StatusCode.UNAUTHENTICATED)
    assert not worker.requests


async def test_each_scope_has_its_part_of_the_control_plane(client, as_):
    cases = {
        ("GET", "registry", "/v1/models"): {"publish": 200, "operate": 200, "admin": 200, "infer": 403},
        ("POST", "registry", "/v1/deploy"): {"publish": 400, "operate": 403, "admin": 400, "infer": 403},
        ("PUT", "registry", "/v1/deployments/x/override"): {"publish": 403, "operate": 400, "infer": 403},
        ("PUT", "registry", "/v1/deployments/override"): {"publish": 400, "operate": 403, "infer": 403},
        ("PUT", "registry", "/v1/endpoints/settle"): {"publish": 400, "operate": 403},
        ("PUT", "registry", "/v1/endpoints/quota"): {"publish": 400, "operate": 403, "admin": 400},
        ("PATCH", "registry", "/v1/deployments/x/policy"): {"publish": 403, "operate": 404},
        ("GET", "registry", "/health/live"): {"publish": 200, "operate": 200, "infer": 403},
        ("GET", "registry", "/metrics"): {"publish": 403, "operate": 200, "infer": 403},
        ("PATCH", "registry", "/v1/models"): {"admin": 405},
        ("GET", "registry", "/v1/nothing"): {"admin": 404},
        ("GET", "registry", "/v1/keys/table%0A"): {"admin": 400},
        ("GET", "registry", "/v1/keys"): {"publish": 403, "operate": 403, "admin": 200},
        ("GET", "registry", "/v1/audit"): {"operate": 403, "admin": 200},
        ("GET", "router", "/v1/routes"): {"publish": 403, "operate": 503, "infer": 403},
        ("GET", "registry", "/v1/keys/table"): {"admin": 403},
        ("GET", "elsewhere", "/v1/models"): {"admin": 404},
    }
    keys = {scope: await as_(scope) for scope in ("infer", "publish", "operate", "admin")}
    for (method, service, path), expected in cases.items():
        for scope, status in expected.items():
            answer = await client.request(
                method, f"/api/{service}{path}", headers=keys[scope], json={} if method != "GET" else None
            )
            assert answer.status_code == status, (scope, method, path, answer.text)


async def test_metrics_beyond_loopback_need_the_metrics_token(client, as_):
    scrapes = bearer(metrics_token("token"))
    assert (await client.get("/metrics")).status_code == 401
    assert (await client.get("/metrics", headers=await as_("infer"))).status_code == 403
    for headers in (scrapes, await as_("operate"), bearer("token")):
        assert "# TYPE" in (await client.get("/metrics", headers=headers)).text
    for path in ("/v2/models", "/v1/jobs", "/api/registry/v1/models", "/api/autoscaler/v1/replicas"):
        assert (await client.get(path, headers=scrapes)).status_code == 403, path
    infer = await client.post(INFER, json=BODY, headers=scrapes)
    assert infer.status_code == 403


async def test_encoded_paths_do_not_reach_other_routes(client, gateway, as_):
    headers = await as_("operate")
    for path in (
        "/api/registry/v1/models/../keys",
        "/api/registry/v1/%2e%2e/v1/keys",
        "/api/registry/v1%2Fkeys",
    ):
        url = httpx.URL(gateway.url).copy_with(raw_path=path.encode())
        assert (await client.get(url, headers=headers)).status_code in (403, 404), path


async def test_calls_stream_and_are_audited_with_caller_and_address(client, registry, as_):
    publisher, admin = await as_("publish", name="olga"), await as_("admin")
    content = os.urandom(3_000_000)

    async def pieces():
        for at in range(0, len(content), 64_000):
            yield content[at : at + 64_000]

    uploaded = await client.put("/api/registry/v1/artifacts", content=pieces(), headers=publisher)
    assert uploaded.status_code == 201, uploaded.text
    sha256 = uploaded.json()["sha256"]
    fetched = await client.get(f"/api/registry/v1/artifacts/{sha256}", headers=publisher)
    assert (fetched.content, fetched.headers["etag"]) == (content, f'"{sha256}"')

    headers = publisher | {
        "X-Request-Id": "r-7",
        "X-Tidegate-Principal": '{"id": "x", "name": "x", "scopes": ["admin"], "endpoints": null}',
        "X-Tidegate-Origin": "192.0.2.1",
    }
    model = await client.put("/api/registry/v1/artifacts", content=onnx_bytes(), headers=publisher)
    body = {"artifact": model.json()["sha256"], "filename": "model.onnx"}
    made = await client.post("/api/registry/v1/models/m/versions", json=body, headers=headers)
    assert made.status_code == 201, made.text
    assert made.headers["x-request-id"] == "r-7"
    entry = (await client.get("/api/registry/v1/audit?limit=1", headers=admin)).json()["items"][0]
    assert (entry["principal_name"], entry["origin"], entry["request_id"]) == ("olga", "127.0.0.1", "r-7")
    assert (entry["kind"], entry["name"], entry["action"]) == ("version", "m/1", "created")
    missing = await client.get("/api/registry/v1/models/none", headers=publisher)
    assert (missing.status_code, missing.json()["reason"]) == (404, "not_found")


async def test_tokens_of_the_issuer(client, worker, issuer):
    good = issuer.token()
    assert (await client.post(INFER, json=BODY, headers=bearer(good))).status_code == 200
    assert (await client.get("/api/registry/v1/models", headers=bearer(good))).status_code == 403
    operator = issuer.token(realm={"roles": ["platform", "unknown"]})
    assert (await client.get("/api/registry/v1/models", headers=bearer(operator))).status_code == 200
    nobody = issuer.token(realm={"roles": ["admin"]})
    assert (await client.post(INFER, json=BODY, headers=bearer(nobody))).status_code == 403
    another = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for bad in (
        issuer.token(exp=dt.datetime.now(dt.UTC) - dt.timedelta(minutes=2)),
        issuer.token(aud="other"),
        issuer.token(iss="other"),
        issuer.token(key=another),
        issuer.token(key="A" * 64, algorithm="HS256"),
        issuer.token(key="", algorithm="none"),
        f"{good}x",
    ):
        answer = await client.post(INFER, json=BODY, headers=bearer(bad))
        assert (answer.status_code, answer.json()["reason"]) == (401, "unauthorized")


async def test_callers_with_a_token_have_the_limits_of_their_role(client, worker, issuer, registry, as_):
    def headers(sub: str) -> dict[str, str]:
        # Each token is another text, so each is verified.
        return bearer(
            issuer.token(sub=sub, realm={"roles": ["scientists", "trial"]}, nonce=os.urandom(4).hex())
        )

    for sub in ("trial-1", "auth0|trial/2 x"):
        for left in (2, 1, 0):
            answer = await client.post(INFER, json=BODY, headers=headers(sub))
            assert answer.status_code == 200
            assert f'"day";r={left}' in answer.headers["RateLimit"]
        await as_("infer")  # the gateway reads the table of keys again
        refused = await client.post(INFER, json=BODY, headers=headers(sub))
        assert (refused.status_code, refused.json()["reason"]) == (429, "quota_exhausted")
        assert "this caller has used up its requests for the day" in refused.json()["error"]
        assert int(refused.headers["Retry-After"]) > 0
    everyone = await client.post(INFER, json=BODY, headers=bearer(issuer.token(sub="trial-1-not")))
    assert '"day";q=100000' in everyone.headers["RateLimit-Policy"]
    page = (await client.get("/metrics", headers=await as_("admin"))).text
    assert 'tidegate_gateway_limited_total{key="jwt",limit="day"} 2.0' in page
    assert "trial-1" not in page


async def test_a_new_key_of_the_issuer_is_found(client, worker, issuer, until):
    issuer.publish("second")
    token = issuer.token()

    async def taken() -> bool:
        return (await client.post(INFER, json=BODY, headers=bearer(token))).status_code == 200

    await until(taken)


async def test_no_secret_is_in_a_log_line(client, gateway, registry, worker, as_, issuer):
    headers = await as_("admin", "infer")
    made = await client.post("/api/registry/v1/keys", json={"name": "logged"}, headers=headers)
    rotated = await client.post(f"/api/registry/v1/keys/{made.json()['id']}/rotate", headers=headers)
    token = issuer.token()
    secrets = [
        headers["Authorization"][7:],
        made.json()["key"],
        rotated.json()["key"],
        token,
        "tg_a_wrong-one",
    ]
    for secret in secrets:
        await client.post(INFER, json=BODY, headers=bearer(secret))
        await client.get("/api/registry/v1/keys", headers=bearer(secret))
        await client.get("/v1/nothing", headers=bearer(secret))
    await client.post(INFER, json=BODY, headers={"Authorization": "Basic c2VjcmV0OnNlY3JldA=="})
    await asyncio.sleep(0.1)
    logs = (gateway.state / "log").read_text() + registry.log.read_text()
    assert '"path": "/api/registry/v1/keys"' in logs, "this is the right log"
    for secret in [*secrets, "c2VjcmV0OnNlY3JldA=="]:
        assert secret not in logs
        assert secret[-16:] not in logs, "not even a part"
    assert not re.search(r"[Bb]earer \S", logs)
    kept = gateway.state / "data" / "gateway-keys.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    known = kept.read_text()
    assert not any(secret[-16:] in known for secret in secrets), "the cache has hashes, not secrets"


async def test_a_caller_that_disconnects_during_an_upload_is_no_server_error(gateway, as_, until):
    headers = await as_("publish")
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    told_of = headers | {"Host": "localhost", "X-Request-Id": "leaves", "Content-Length": "1000"}
    head = "".join(f"{name}: {value}\r\n" for name, value in told_of.items())
    writer.write(f"POST /api/registry/v1/models HTTP/1.1\r\n{head}\r\nhalf".encode())
    await writer.drain()
    await asyncio.sleep(0.2)
    writer.close()

    def told() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (gateway.state / "log").read_text().splitlines()]
        return [line for line in lines if line.get("request_id") == "leaves"]

    await until(lambda: [line for line in told() if line.get("path")])
    assert [line for line in told() if line["level"].lower() == "error"] == []


async def test_slow_uploads_do_not_close_the_control_plane_to_others(client, gateway, as_):
    """A hundred slow uploads once used all connections to the registry; all others waited for minutes."""
    address = urlsplit(gateway.url)
    credential = (await as_("publish"))["Authorization"]
    head = (
        f"PUT /api/registry/v1/artifacts HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Authorization: {credential}\r\nContent-Length: 1000000\r\n\r\n"
    )
    opened = [await asyncio.open_connection(address.hostname, address.port) for _ in range(120)]
    try:
        for _, writer in opened:
            writer.write(head.encode() + b"x")
            await writer.drain()
        # The earlier uploads are in flight by now: one gateway process handles requests in order.
        for _ in range(3):
            answer = await client.get("/api/registry/v1/models", headers={"Authorization": credential})
            assert answer.status_code == 200
    finally:
        for _, writer in opened:
            writer.close()


async def test_a_get_does_not_wait_for_a_body(gateway, as_):
    address = urlsplit(gateway.url)
    credential = (await as_("publish"))["Authorization"]
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        f"GET /api/registry/v1/models HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Authorization: {credential}\r\nContent-Length: 1000\r\n\r\n".encode()
    )
    assert b" 200 " in await asyncio.wait_for(reader.readline(), 60)
    writer.close()
