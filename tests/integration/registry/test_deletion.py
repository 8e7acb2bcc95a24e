"""Deleted versions over HTTP, on the real database: restored, removed for good, retained, and quotas."""

from __future__ import annotations

from typing import Any

from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.protocol.access import PUBLISH, Principal

DAY = 86_400.0


async def numbers(call: Any, **query: Any) -> list[int]:
    answer = await call("GET", "/v1/models/digits/versions", params=query)
    return [item["number"] for item in answer["items"]]


async def test_a_deleted_version_can_be_restored_until_the_grace_time_is_over(opened):
    async with opened(deleted_version_s=DAY) as call:
        for seed in (1, 2, 3):
            await call.register("digits", onnx_bytes(seed), metadata={"metrics": {"accuracy": 0.9}})
        await call("PUT", "/v1/models/digits/versions/2/card", {"text": "# Two"})
        await call("DELETE", "/v1/models/digits/versions/2", status=204)
        await call("DELETE", "/v1/models/digits/versions/1", status=204)
        assert await numbers(call) == [3]
        assert await numbers(call, deleted="true") == [1, 2]
        assert len((await call("GET", "/v1/versions", params={"filter": "accuracy > 0"}))["items"]) == 1
        await call("GET", "/v1/models/digits/versions/2", status=404)
        await call("POST", "/v1/deploy", {"model": "digits", "version": 2}, status=404)
        answer = await call("POST", "/v1/models/digits/versions/3/restore", {}, status=409)
        assert "is not deleted" in answer["error"]
        assert (await call("POST", "/v1/models/digits/versions/2/restore", {}))["versions"] == [2]
        assert (await call("GET", "/v1/models/digits/versions/2/card"))["text"] == "# Two"
        call.clock.forward(2 * DAY)
        assert len(call.stored()) == 3
        await call.maintain()
        assert len(call.stored()) == 2, "the artifact of version 1 is gone, that of version 2 is not"
        answer = await call("POST", "/v1/models/digits/versions/1/restore", {}, status=404)
        assert "TIDEGATE_DELETED_VERSION_S" in answer["error"]
        assert (await call.register("digits", onnx_bytes(1)))["number"] == 4, "numbers are never used again"
        await call("POST", "/v1/deploy", {"model": "digits"})
        await call("DELETE", "/v1/models/digits?cascade=true")
        await call("GET", "/v1/models/digits", status=404)
        assert (await call("POST", "/v1/models/digits/restore", {}))["versions"] == [2, 3, 4]
        assert await numbers(call) == [2, 3, 4]
        actions = [(e["name"], e["action"]) for e in (await call("GET", "/v1/audit?kind=version"))["items"]]
        assert ("digits/2", "restored") in actions


async def test_retention_keeps_what_is_used_aliased_or_a_rollback_target(call):
    for seed in range(1, 8):
        await call.register("digits", onnx_bytes(seed))
        call.clock.forward(DAY)
    for number in (2, 4):
        await call("POST", "/v1/deploy", {"model": "digits", "version": number})
        await call("POST", "/v1/endpoints/digits/settle", {})
    await call("DELETE", "/v1/deployments/digits-v2", status=204)
    await call("PUT", "/v1/models/digits/aliases/champion", {"version": 1})
    path = "/v1/models/digits"
    plan = await call("POST", f"{path}/retention?dry_run=true", {"retention": {"keep_last": 2}})
    fates = {item["version"]: (item["delete"], item["reason"]) for item in plan["items"]}
    assert [number for number, (gone, _) in fates.items() if gone] == [3, 5]
    assert "champion" in fates[1][1]
    assert "rollback" in fates[2][1]
    assert "digits-v4" in fates[4][1]
    assert await numbers(call) == list(range(1, 8)), "a dry run changes nothing"
    await call("PATCH", f"{path}/policy", {"retention": {"keep_last": 2, "max_age_days": 4.5}})
    await call.maintain()
    assert await numbers(call) == [1, 2, 4, 5, 6, 7], "version 5 is not old enough"
    call.clock.forward(2 * DAY)
    await call.maintain()
    assert await numbers(call) == [1, 2, 4, 6, 7]
    wrong = await call("PATCH", f"{path}/policy", {"retention": {"keep": 2}}, status=400)
    assert "there is no field" in wrong["error"]
    await call("PATCH", f"{path}/policy", {"retention": None})
    plan = await call("POST", f"{path}/retention", {})
    assert (plan["applied"], [item["delete"] for item in plan["items"]]) == (True, [False] * 5)


async def test_a_keys_quota_counts_its_versions_and_their_bytes(call):
    made = await call(
        "POST", "/v1/keys", {"name": "ci", "scopes": ["publish"], "max_versions": 2}, status=201
    )
    ci = Principal(made["id"], "ci", frozenset({PUBLISH}))
    own: dict[str, Any] = {"headers": {"X-Tidegate-Principal": ci.to_header()}}

    async def register(seed: int, status: int | None = None) -> Any:
        body = {"artifact": await call.upload(onnx_bytes(seed)), "filename": "m.onnx"}
        return await call("POST", "/v1/models/digits/versions", body, status=status, **own)

    await register(1)
    await register(2)
    await register(2)  # the same version again
    refused = await register(3, status=403)
    assert refused["reason"] == "quota_exceeded"
    assert "has 2 registered versions, and the key's quota is 2" in refused["error"]
    check = {"filename": "m.onnx", "artifact": await call.upload(onnx_bytes(3))}
    refused = await call("POST", "/v1/models/digits/check", check, status=403, **own)
    assert refused["reason"] == "quota_exceeded", "before the upload, too"
    await call("DELETE", "/v1/models/digits/versions/1", status=204)
    mine = await call("GET", "/v1/versions", params={"filter": f"registered_by = '{made['id']}'"})
    assert [item["number"] for item in mine["items"]] == [2]
    await register(3)
    size = len(onnx_bytes(2)) + len(onnx_bytes(3))
    limits = {"max_versions": None, "max_artifact_bytes": size + 1}
    await call("PATCH", f"/v1/keys/{made['id']}", limits)
    assert "more, they would exceed the key's quota" in (await register(4, status=403))["error"]
    await call.register("digits", onnx_bytes(4))
