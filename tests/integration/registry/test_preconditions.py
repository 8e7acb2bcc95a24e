"""``If-Match`` and ``If-None-Match`` on every object that can be edited: 412, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.registry.conftest import Caller
from tests.integration.registry.onnx_files import onnx_bytes

DEPLOYMENT = {"model": "digits", "version": 1}
ENDPOINT = {"targets": [{"deployment": "mine"}]}
CHANGES: list[tuple[str, list[tuple[str, str, Any]]]] = [
    (
        "/v1/deployments/mine",
        [
            ("PUT", "", {**DEPLOYMENT, "threads": 3}),
            ("PATCH", "", {"threads": 2}),
            ("PATCH", "/policy", {"max_replicas": 9}),
            ("PUT", "/override", {"replicas": 2}),
            ("DELETE", "/override", None),
        ],
    ),
    (
        "/v1/endpoints/e",
        [
            ("PUT", "", {**ENDPOINT, "default_timeout_ms": 700}),
            ("POST", "/split", {"targets": [{"deployment": "mine"}]}),
            ("DELETE", "/shadow", None),
            ("DELETE", "", None),
        ],
    ),
    (
        "/v1/models/digits/versions/1",
        [("PATCH", "", {"metadata": {"notes": "new"}}), ("DELETE", "", None)],
    ),
    (
        "/v1/models/digits/versions/1/card",
        [("PUT", "", {"text": "# Other"}), ("DELETE", "", None)],
    ),
    (
        "/v1/models/digits/aliases/champion",
        [("PUT", "", {"version": 2}), ("DELETE", "", None)],
    ),
    (
        "/v1/models/digits/policy",
        [("PATCH", "", {"retention": {"keep_last": 3}})],
    ),
]


@pytest.fixture
async def filled(call: Caller) -> Caller:
    await call.register("digits", onnx_bytes(1))
    await call("PUT", "/v1/deployments/mine", DEPLOYMENT)
    await call("PUT", "/v1/endpoints/e", ENDPOINT)
    await call.register("digits", onnx_bytes(2))
    await call("PUT", "/v1/models/digits/versions/1/card", {"text": "# Digits"})
    await call("PUT", "/v1/models/digits/aliases/champion", {"version": 1})
    return call


@pytest.mark.parametrize(("path", "changes"), CHANGES, ids=[path for path, _ in CHANGES])
async def test_a_stale_etag_changes_nothing(filled: Caller, path: str, changes: list[Any]) -> None:
    before = await filled.http.get(path)
    stale = {"headers": {"If-Match": '"stale"'}}
    for method, below, body in changes:
        refused = await filled(method, f"{path}{below}", body, status=412, **stale)
        assert refused["reason"] == "precondition_failed"
    after = await filled.http.get(path)
    assert (after.json(), after.headers["ETag"]) == (before.json(), before.headers["ETag"])
    method, below, body = changes[0]
    fresh = {"If-Match": before.headers["ETag"]}
    changed = await filled.http.request(method, f"{path}{below}", json=body, headers=fresh)
    assert changed.status_code == 200, changed.text
    assert changed.headers["ETag"] != before.headers["ETag"]
    assert changed.headers["ETag"] == (await filled.http.get(path)).headers["ETag"]
    await filled(method, f"{path}{below}", body, status=412, headers=fresh)
    # The precondition of one request is not that of the next one.
    await filled("POST", "/v1/deploy", {"model": "digits", "version": 1, "endpoint": "other"})


async def test_only_create_and_only_replace(filled: Caller) -> None:
    create, replace = {"headers": {"If-None-Match": "*"}}, {"headers": {"If-Match": "*"}}
    assert (
        "already exists"
        in (await filled("PUT", "/v1/deployments/mine", DEPLOYMENT, status=412, **create))["error"]
    )
    await filled("PUT", "/v1/deployments/new", DEPLOYMENT, status=201, **create)
    await filled("PUT", "/v1/endpoints/new", ENDPOINT, status=412, **replace)
    await filled("PUT", "/v1/endpoints/e", ENDPOINT, status=200, **replace)
    await filled("PATCH", "/v1/deployments/mine", {}, status=400, headers={"If-Match": ""})


async def test_keys_and_an_endpoint_that_has_not_changed(filled: Caller) -> None:
    made = await filled.http.post("/v1/keys", json={"name": "ci", "scopes": ["infer"]})
    path, etag = f"/v1/keys/{made.json()['id']}", made.headers["ETag"]
    assert (await filled.http.get(path)).headers["ETag"] == etag
    patched = await filled.http.patch(path, json={"name": "cd"}, headers={"If-Match": etag})
    assert patched.headers["ETag"] != etag
    stale = {"headers": {"If-Match": etag}}
    await filled("PATCH", path, {"name": "ce"}, status=412, **stale)
    await filled("POST", f"{path}/rotate", None, status=412, **stale)
    await filled("DELETE", path, status=412, **stale)
    endpoint = await filled.http.get("/v1/endpoints/e")
    same = await filled.http.get("/v1/endpoints/e", headers={"If-None-Match": endpoint.headers["ETag"]})
    assert (same.status_code, same.content) == (304, b"")
