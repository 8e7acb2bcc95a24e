"""API keys over HTTP: shown once, stored hashed, changed, rotated, expired and revoked."""

from __future__ import annotations

from pathlib import Path

from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.access import Principal


async def table(call) -> dict[str, access.Key]:
    keys = (await call("GET", "/v1/keys/table"))["keys"]
    return {key["id"]: access.Key.from_dict(key) for key in keys}


async def test_a_key_is_shown_once_and_stored_hashed(call, tmp_path):
    made = await call("POST", "/v1/keys", {"name": "robot", "rate": 5, "endpoints": ["digits"]}, status=201)
    key = made["key"]
    assert key.startswith(f"tg_{made['id']}_")
    assert len(key.split("_", 2)[2]) == 43, "256 bits"
    assert made["prefix"] == f"tg_{made['id']}"
    assert (made["scopes"], made["endpoints"], made["state"]) == (["infer"], ["digits"], "active")

    shown = await call("GET", f"/v1/keys/{made['id']}")
    listed = (await call("GET", "/v1/keys"))["items"]
    assert [shown] == listed
    assert "key" not in shown
    assert not any("digest" in name for name in shown)
    for file in Path(tmp_path, "data").glob("registry.db*"):  # none with PostgreSQL
        assert key.split("_", 2)[2].encode() not in file.read_bytes()

    known = (await table(call))[made["id"]]
    assert known.digest == access.digest_of(key.encode())
    assert known.principal == Principal(made["id"], "robot", frozenset({"infer"}), frozenset({"digits"}))
    assert known.allowance == access.Allowance(rate=5, burst=5)


async def test_the_table_of_keys_has_an_etag(call):
    empty = await call.http.get("/v1/keys/table")
    await call("POST", "/v1/keys", {"name": "a"})
    filled = await call.http.get("/v1/keys/table", headers={"If-None-Match": empty.headers["etag"]})
    assert filled.status_code == 200
    again = await call.http.get("/v1/keys/table", headers={"If-None-Match": filled.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_rotation_keeps_the_old_secret_for_the_grace(call):
    made = await call("POST", "/v1/keys", {"name": "a"})
    fresh = await call("POST", f"/v1/keys/{made['id']}/rotate", {"grace_s": 60})
    assert fresh["id"] == made["id"]
    assert fresh["key"] != made["key"]
    known = (await table(call))[made["id"]]
    assert known.digest == access.digest_of(fresh["key"].encode())
    assert known.previous == access.digest_of(made["key"].encode())
    assert known.previous_until_ms == (call.clock.now.timestamp() + 60) * 1e3
    call.clock.forward(61)
    assert (await call("GET", f"/v1/keys/{made['id']}"))["previous_until"] is None
    await call("POST", f"/v1/keys/{made['id']}/rotate")
    assert (await table(call))[made["id"]].previous is None, "without grace the old one is gone at once"


async def test_a_revoked_key_stays_revoked(call):
    made = await call("POST", "/v1/keys", {"name": "a"})
    path = f"/v1/keys/{made['id']}"
    gone = await call("DELETE", path)
    assert gone["state"] == "revoked"
    assert await call("DELETE", path) == gone, "again changes nothing"
    assert await table(call) == {}
    assert (await call("GET", "/v1/keys"))["items"] == []
    assert [key["state"] for key in (await call("GET", "/v1/keys?all=true"))["items"]] == ["revoked"]
    for method, target, body in (("PATCH", path, {"rate": 1}), ("POST", f"{path}/rotate", {})):
        await call(method, target, body, status=409)
    await call("DELETE", "/v1/keys/nothing", status=404)


async def test_changes_and_expiry(call):
    made = await call("POST", "/v1/keys", {"name": "a", "ttl_s": 60, "rate": 10, "burst": 20, "day": 5})
    path = f"/v1/keys/{made['id']}"
    changed = await call("PATCH", path, {"rate": 30, "burst": None, "scopes": ["operate", "infer"]})
    assert (changed["rate"], changed["burst"], changed["day"]) == (30, None, 5)
    assert changed["scopes"] == ["infer", "operate"]
    assert (await table(call))[made["id"]].allowance == access.Allowance(rate=30, burst=30, day=5)
    call.clock.forward(61)
    assert (await call("GET", path))["state"] == "expired"
    renamed = await call("PATCH", path, {"name": "b"})
    assert (renamed["name"], renamed["state"]) == ("b", "expired")
    assert (await call("PATCH", path, {"ttl_s": 60}))["state"] == "active"
    assert (await call("PATCH", path, {"expires_at": None}))["expires_at"] is None


async def test_bad_fields_are_refused(call):
    for body, why in (
        ({}, "name is required"),
        ({"name": "a", "scopes": ["root"]}, "scopes"),
        ({"name": "a", "burst": 3}, "a burst needs a rate"),
        ({"name": "a", "rate": 1000, "burst": 3}, "a burst of at least 50"),
        ({"name": "a", "endpoints": ["No Name"]}, "endpoints"),
        ({"name": "a", "expires_at": "2020-01-01T00:00:00Z"}, "must expire in the future"),
        ({"name": "a", "expires_at": "2030-01-01T00:00:00"}, "timezone"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a", "color": "red"}, "no field"),
    ):
        answer = await call("POST", "/v1/keys", body, status=400)
        assert why in answer["error"], answer


async def test_keys_are_for_admins_only(call):
    publisher = Principal("p", "p", frozenset({"publish", "operate"}))
    headers = {"X-Tidegate-Principal": publisher.to_header()}
    for path in ("/v1/keys", "/v1/audit", "/v1/usage"):
        await call("GET", path, headers=headers, status=403)
    assert (await call("GET", "/v1/models", headers=headers))["items"] == []


async def test_a_principal_needs_the_service_token(call):
    admin = Principal("x", "x", frozenset({"admin"})).to_header()
    answer = await call.http.get(
        "/v1/keys", headers={"Authorization": "Bearer wrong", "X-Tidegate-Principal": admin}
    )
    assert answer.status_code == 401
    await call("GET", "/v1/keys", headers={"X-Tidegate-Principal": "[1"}, status=400)
