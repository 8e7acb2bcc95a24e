"""Stages and approvals over HTTP, on the real database."""

from __future__ import annotations

from typing import Any

from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.protocol.access import OPERATE, PUBLISH, Principal

STAGES = {
    "stages": [
        {"name": "staging", "checks": "accuracy > 0.9 and owner is not null"},
        {"name": "production", "approvals": 2},
    ],
    "serve_from": "production",
}


def by(name: str, *scopes: str) -> dict[str, Any]:
    return {"headers": {"X-Tidegate-Principal": Principal(name, name, frozenset(scopes)).to_header()}}


async def test_a_version_serves_after_its_checks_and_approvals(call):
    ann, bob, eve = (by(name, PUBLISH, OPERATE) for name in ("ann", "bob", "eve"))
    body = {"artifact": await call.upload(onnx_bytes()), "filename": "m.onnx"}
    await call("POST", "/v1/models/digits/versions", body, **ann)
    refused = await call("PATCH", "/v1/models/digits/policy", STAGES, status=403, **ann)
    assert refused["reason"] == "forbidden", "a publisher does not remove the rules for itself"
    await call("PATCH", "/v1/models/digits/policy", STAGES)
    await call("PATCH", "/v1/models/digits/policy", {"retention": {"keep_last": 3}}, **ann)
    path, deploy = "/v1/models/digits/versions/1", {"model": "digits"}
    refused = await call("POST", "/v1/deploy", deploy, status=409, **ann)
    assert refused["reason"] == "stage_required"
    assert "tidegate stage digits@1" in refused["error"]

    refused = await call("PUT", f"{path}/stage", {"stage": "staging"}, status=409, **ann)
    assert "does not match" in refused["error"]
    await call("PATCH", path, {"metadata_patch": {"metrics": {"accuracy": 0.95}, "owner": "ann"}})
    assert (await call("PUT", f"{path}/stage", {"stage": "staging"}, **ann))["stage"] == "staging"
    own = await call("POST", f"{path}/approvals", {"stage": "production"}, **ann)
    assert own["missing"] == ["the version has 0 of 2 approvals by other keys with the scope operate"]
    await call("POST", f"{path}/approvals", {"stage": "production"}, status=403, **by("joe", PUBLISH))
    await call("POST", f"{path}/approvals", {"stage": "production", "comment": "fine"}, **bob)
    await call("POST", f"{path}/approvals", {"stage": "production"}, **eve)
    await call("DELETE", f"{path}/approvals/production", status=204, **eve)
    refused = await call("PUT", f"{path}/stage", {"stage": "production"}, status=409, **ann)
    assert "the version has 1 of 2 approvals" in refused["error"]
    view = await call("POST", f"{path}/approvals", {"stage": "production"}, **eve)
    assert (view["next"], view["missing"]) == ("production", [])
    await call("PUT", f"{path}/stage", {"stage": "production"}, **ann)
    assert (await call("GET", path))["stage"] == "production"
    listed = await call("GET", "/v1/versions", params={"filter": "stage = production"})
    assert [item["number"] for item in listed["items"]] == [1]
    await call("POST", "/v1/deploy", deploy, **ann)

    moved = await call("PUT", f"{path}/stage", {"stage": "none"}, **ann)
    assert (moved["stage"], moved["next"]) == (None, "staging")
    await call("PATCH", "/v1/deployments/digits-v1", {"max_replicas": 2}, **ann)
    changes = [e["after"] for e in (await call("GET", "/v1/audit?kind=version"))["items"]]
    assert {"stage": "production"} in changes
    assert {"approved": "production", "comment": "fine"} in changes
    await call("PATCH", "/v1/models/digits/policy", {"stages": None, "serve_from": None})
    assert (await call("GET", f"{path}/stage"))["next"] is None


async def test_two_keys_of_one_owner_are_one_approval(call):
    made = {}
    for name, owner in (("bob1", "bob"), ("bob2", "bob"), ("eve", None)):
        body = {"name": name, "scopes": ["operate"], "owner": owner}
        made[name] = (await call("POST", "/v1/keys", body, status=201))["id"]
    await call.register("digits", onnx_bytes())
    await call("PATCH", "/v1/models/digits/policy", {"stages": [{"name": "production", "approvals": 2}]})
    path = "/v1/models/digits/versions/1"
    for name in ("bob1", "bob2"):
        await call("POST", f"{path}/approvals", {"stage": "production"}, **by(made[name], OPERATE))
    refused = await call("PUT", f"{path}/stage", {"stage": "production"}, status=409)
    assert "the version has 1 of 2 approvals" in refused["error"]
    assert "several keys of one owner count as one" in refused["error"]
    view = await call("POST", f"{path}/approvals", {"stage": "production"}, **by(made["eve"], OPERATE))
    owners = {each["principal"]: each["owner"] for each in view["approvals"]}
    assert owners == {made["bob1"]: "bob", made["bob2"]: "bob", made["eve"]: None}
    assert view["missing"] == []
    await call("PATCH", f"/v1/keys/{made['eve']}", {"owner": "bob"})
    assert len((await call("GET", f"{path}/stage"))["missing"]) == 1
    await call("PATCH", f"/v1/keys/{made['bob2']}", {"owner": None})
    await call("PUT", f"{path}/stage", {"stage": "production"})


async def test_the_stages_of_a_model_outlive_it(call):
    ann = by("ann", PUBLISH, OPERATE)
    body = {"artifact": await call.upload(onnx_bytes()), "filename": "m.onnx"}
    await call("POST", "/v1/models/digits/versions", body, **ann)
    await call("PATCH", "/v1/models/digits/policy", STAGES | {"retention": {"keep_last": 3}})
    await call("DELETE", "/v1/models/digits?permanent=true", **ann)
    body = {"artifact": await call.upload(onnx_bytes()), "filename": "m.onnx"}
    await call("POST", "/v1/models/digits/versions", body, **ann)
    refused = await call("POST", "/v1/deploy", {"model": "digits"}, status=409, **ann)
    assert refused["reason"] == "stage_required"
    policy = await call("GET", "/v1/models/digits/policy")
    assert (policy["serve_from"], policy["retention"]["keep_last"]) == ("production", None)


async def test_a_file_states_aliases_retention_and_stages(call):
    for seed in (1, 2, 3):
        await call.register("digits", onnx_bytes(seed))
    await call("PUT", "/v1/models/digits/aliases/old", {"version": 1})
    stated = {"name": "digits", "aliases": {"champion": 2}, "retention": {"keep_last": 5}, **STAGES}
    publisher = by("ann", PUBLISH)
    refused = await call("POST", "/v1/apply", {"models": [stated]}, status=403, **publisher)
    assert refused["reason"] == "forbidden", "the stages need the scope admin, in a file too"
    applied = await call("POST", "/v1/apply", {"models": [stated]})
    assert [(item["kind"], item["action"]) for item in applied["items"]] == [("model", "updated")]
    assert (await call("GET", "/v1/models/digits/aliases"))["items"] == [{"alias": "champion", "version": 2}]
    policy = await call("GET", "/v1/models/digits/policy")
    assert (policy["retention"]["keep_last"], policy["serve_from"]) == (5, "production")
    again = await call("POST", "/v1/apply", {"models": [stated]}, **publisher)
    assert again["items"][0]["action"] == "unchanged"
    deployment = {"name": "own", "model": "digits", "version": 1}
    body = {"models": [stated], "deployments": [deployment]}
    assert (await call("POST", "/v1/apply", body, status=409))["reason"] == "stage_required"
    for wrong, words in (
        ({**stated, "aliases": {"champion": 9}}, "has no version 9"),
        ({"name": "letters"}, "has no version"),
        ({"name": "digits", "keep": 1}, "there is no field 'keep'"),
    ):
        answer = await call.http.post("/v1/apply", json={"models": [wrong]})
        assert answer.status_code in (400, 404)
        assert words in answer.json()["error"]
    await call("POST", "/v1/apply", {"models": [{"name": "digits"}]})
    assert (await call("GET", "/v1/models/digits/policy"))["stages"] == []
    assert len((await call("GET", "/v1/models/digits/aliases"))["items"]) == 1, "not stated, so they stay"
