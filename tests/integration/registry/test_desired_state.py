"""Models, deployments and endpoints over HTTP, on the real database."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.protocol.access import SCOPES, Principal


async def test_register_reads_the_signature_and_numbers_versions(call):
    first = await call.register("digits", onnx_bytes(1), metadata={"notes": "first", "metrics": {"acc": 0.9}})
    assert (first["number"], first["format"], first["filename"]) == (1, "onnx", "model.onnx")
    assert first["signature"]["max_batch_size"] == 64
    assert first["signature"]["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [64], "optional": False}
    ]
    assert first["artifact_size"] == len(onnx_bytes(1))
    second = await call.register("digits", onnx_bytes(2))
    assert second["number"] == 2
    model = await call("GET", "/v1/models/digits")
    assert (model["versions"], model["latest"]["number"]) == ([1, 2], 2)
    listed = await call("GET", "/v1/models")
    assert [item["name"] for item in listed["items"]] == ["digits"]
    versions = await call("GET", "/v1/models/digits/versions")
    assert [item["metadata"]["notes"] for item in versions["items"]] == ["first", ""]


async def test_registering_the_same_bytes_again_is_idempotent(call):
    digest = await call.upload(onnx_bytes())
    body = {"artifact": digest, "filename": "m.onnx"}
    made = await call("POST", "/v1/models/digits/versions", body, status=201)
    assert await call("POST", "/v1/models/digits/versions", body, status=200) == made
    described = {**body, "metadata": {"notes": "seen again"}}
    again = await call("POST", "/v1/models/digits/versions", described, status=200)
    assert (again["number"], again["metadata"]["notes"]) == (1, "seen again")
    await call.register("digits", onnx_bytes(2))
    back = await call("POST", "/v1/models/digits/versions", body, status=200)
    assert back["number"] == 1, "an earlier version's bytes are that version"
    assert (await call("GET", "/v1/models/digits"))["versions"] == [1, 2]


async def test_concurrent_registrations_get_different_numbers(call):
    made = await asyncio.gather(*(call.register("digits", onnx_bytes(seed)) for seed in range(8)))
    assert sorted(version["number"] for version in made) == list(range(1, 9))


async def test_refusals_say_why(call):
    digest = await call.upload(b"\xff rubbish")
    refused = [
        ("/v1/models/digits/versions", {"artifact": digest, "filename": "m.onnx"}, "not an ONNX model"),
        ("/v1/models/digits/versions", {"artifact": digest, "filename": "m.bin"}, "--model-format"),
        ("/v1/models/digits/versions", {"artifact": digest, "filename": "m.joblib"}, "allow_pickle=true"),
        ("/v1/models/digits/versions", {"artifact": "0" * 64, "filename": "m.onnx"}, "Upload it"),
        ("/v1/models/-digits/versions", {"artifact": digest, "filename": "m.onnx"}, "not a valid name"),
        ("/v1/models/digits/versions", {"artifact": "0", "filename": "m.onnx"}, "artifact"),
    ]
    for path, body, words in refused:
        answer = await call("POST", path, body, status=400)
        assert words in answer["error"], answer
        assert answer["reason"] == "bad_request"


async def test_metadata_changes_and_a_signature_can_only_be_added(call):
    version = await call.register("digits", onnx_bytes())
    path = "/v1/models/digits/versions/1"
    changed = await call("PATCH", path, {"metadata": {"tags": {"team": "a"}}})
    assert (changed["metadata"]["tags"], changed["signature"]) == ({"team": "a"}, version["signature"])
    other = {**version["signature"], "max_batch_size": 1}
    assert "already" in (await call("PATCH", path, {"signature": other}, status=409))["error"]
    source = b"class TritonPythonModel:\n    def auto_complete_config(config): ..."
    assert (await call.register("code", source, "model.py"))["signature"] is None
    learned = await call("PATCH", "/v1/models/code/versions/1", {"signature": other})
    assert learned["signature"] == other
    again = await call.register("code", source, "model.py")
    assert (again["number"], again["signature"]) == (1, other)


async def test_deploy_rolls_over_settles_and_comes_back(call):
    for seed in (1, 2):
        await call.register("digits", onnx_bytes(seed))
    first = await call("POST", "/v1/deploy", {"model": "digits", "version": 1, "deployment": {"threads": 2}})
    assert first["deployment"]["name"] == "digits-v1"
    assert first["endpoint"]["targets"] == [{"deployment": "digits-v1", "weight": 100}]
    revision = (await call("GET", "/v1/intention"))["revision"]
    again = await call("POST", "/v1/deploy", {"model": "digits", "version": 1})
    assert again == first
    assert (await call("GET", "/v1/intention"))["revision"] == revision, "nothing has changed"
    assert await call("GET", "/v1/desired-state") == await call("GET", "/v1/intention")

    second = await call("POST", "/v1/deploy", {"model": "digits"})
    assert (second["deployment"]["name"], second["deployment"]["threads"]) == ("digits-v2", 2)
    assert second["endpoint"]["previous"] == [{"deployment": "digits-v1", "weight": 100}]
    seen = second["endpoint"]["revision"]
    await call("POST", "/v1/endpoints/digits/settle", {"revision": seen - 1}, status=409)
    settled = await call("POST", "/v1/endpoints/digits/settle", {"revision": seen})
    assert settled["previous"] == []
    assert await call("POST", "/v1/endpoints/digits/settle", {"revision": seen}) == settled
    asleep = await call("GET", "/v1/deployments/digits-v1")
    assert (asleep["min_replicas"], asleep["scale_to_zero_after_s"]) == (0, 30)
    back = await call("POST", "/v1/deploy", {"model": "digits", "version": 1})
    assert (back["deployment"]["min_replicas"], back["endpoint"]["previous"][0]["deployment"]) == (
        1,
        "digits-v2",
    )


async def test_concurrent_deploys_end_in_one_consistent_state(call):
    for seed in range(4):
        await call.register("digits", onnx_bytes(seed))
    wishes = [{"model": "digits", "version": number} for number in (1, 2, 3, 4)]
    await asyncio.gather(*(call("POST", "/v1/deploy", wish) for wish in wishes))
    desired = await call("GET", "/v1/intention")
    assert len(desired["deployments"]) == 4
    (endpoint,) = desired["endpoints"]
    serving = {target["deployment"] for target in endpoint["targets"] + endpoint["previous"]}
    for deployment in desired["deployments"]:
        assert (deployment["min_replicas"] > 0) == (deployment["name"] in serving)


async def test_deployments_put_patch_and_if_match(call):
    await call.register("digits", onnx_bytes())
    body = {"model": "digits", "version": 1, "max_replicas": 3}
    made = await call("PUT", "/v1/deployments/mine", body, status=201)
    assert await call("PUT", "/v1/deployments/mine", body, status=200) == made
    stale = {"headers": {"If-Match": f'"{made["revision"] + 1}"'}}
    await call("PATCH", "/v1/deployments/mine", {"threads": 2}, status=412, **stale)
    fresh = {"headers": {"If-Match": f'"{made["revision"]}"'}}
    changed = await call("PATCH", "/v1/deployments/mine", {"threads": 2}, **fresh)
    assert (changed["threads"], changed["max_replicas"]) == (2, 3)
    assert changed["revision"] > made["revision"]
    await call("PUT", "/v1/deployments/mine", {**body, "version": 2}, status=409)
    await call("PUT", "/v1/deployments/mine", {**body, "treads": 2}, status=400)
    assert [d["name"] for d in (await call("GET", "/v1/deployments?model=digits"))["items"]] == ["mine"]
    assert (await call("GET", "/v1/deployments?model=other"))["items"] == []
    await call("DELETE", "/v1/deployments/mine", status=204)
    await call("GET", "/v1/deployments/mine", status=404)


async def test_what_is_in_use_cannot_be_deleted(call):
    await call.register("digits", onnx_bytes())
    await call("POST", "/v1/deploy", {"model": "digits"})
    for path, user in (
        ("/v1/models/digits/versions/1", "Deployment 'digits-v1'"),
        ("/v1/models/digits", "Deployment 'digits-v1'"),
        ("/v1/deployments/digits-v1", "Endpoint 'digits'"),
    ):
        assert user in (await call("DELETE", path, status=409))["error"]
    await call("DELETE", "/v1/endpoints/digits", status=204)
    await call("DELETE", "/v1/deployments/digits-v1", status=204)
    await call("DELETE", "/v1/models/digits/versions/1?permanent=true", status=204)
    await call("GET", "/v1/models/digits", status=404)
    assert call.stored() == []


async def test_cascade_removes_all_of_a_model_and_numbers_go_on(call):
    for seed in (1, 2):
        await call.register("digits", onnx_bytes(seed))
    await call.register("other", onnx_bytes(2))
    await call("POST", "/v1/deploy", {"model": "digits"})
    gone = await call("DELETE", "/v1/models/digits?cascade=true&permanent=true", status=200)
    assert {(item["kind"], item["name"], item["action"]) for item in gone["items"]} == {
        ("endpoint", "digits", "deleted"),
        ("deployment", "digits-v2", "deleted"),
        ("version", "digits/1", "deleted"),
        ("version", "digits/2", "deleted"),
    }
    desired = await call("GET", "/v1/intention")
    assert (desired["deployments"], desired["endpoints"]) == ([], [])
    assert len(call.stored()) == 1, "the bytes that `other` shares are kept"
    assert (await call.register("digits", onnx_bytes(1)))["number"] == 3


async def test_overrides_expire(call):
    await call.register("digits", onnx_bytes())
    await call("POST", "/v1/deploy", {"model": "digits"})
    path = "/v1/deployments/digits-v1"
    held = await call("PUT", f"{path}/override", {"replicas": 4, "ttl_s": 60})
    assert held["override"]["replicas"] == 4
    call.clock.forward(59)
    assert (await call("GET", path))["override"]["replicas"] == 4
    call.clock.forward(2)
    assert (await call("GET", path))["override"] is None
    assert (await call("GET", "/v1/intention"))["deployments"][0]["override"] is None
    lasting = await call("PUT", f"{path}/override", {"replicas": 0})
    assert lasting["override"] == {"replicas": 0, "expires_at": None, "force": False}
    await call("PUT", f"{path}/override", {"replicas": 4, "force": True})
    assert (await call("GET", path))["override"]["force"] is True
    assert (await call("DELETE", f"{path}/override"))["override"] is None
    await call("DELETE", f"{path}/override", status=200)
    await call("PUT", "/v1/deployments/absent/override", {"replicas": 1}, status=404)


async def test_apply_is_all_or_nothing(call):
    await call.register("digits", onnx_bytes())
    stated = {
        "deployments": [{"name": "d", "model": "digits", "version": 1, "batching": {"max_batch": 8}}],
        "endpoints": [{"name": "e", "targets": [{"deployment": "d"}]}],
    }
    broken = {**stated, "endpoints": [{"name": "e", "targets": [{"deployment": "absent"}]}]}
    await call("POST", "/v1/apply", broken, status=400)
    assert (await call("GET", "/v1/deployments"))["items"] == []
    applied = await call("POST", "/v1/apply", stated)
    assert [item["action"] for item in applied["items"]] == ["created", "created"]
    again = await call("POST", "/v1/apply", stated)
    assert [item["action"] for item in again["items"]] == ["unchanged", "unchanged"]
    assert again["revision"] == applied["revision"]
    endpoint = await call("GET", "/v1/endpoints/e")
    assert endpoint["revision"] == applied["revision"]


async def test_endpoint_put_and_delete(call):
    await call.register("digits", onnx_bytes())
    await call("PUT", "/v1/deployments/d", {"model": "digits", "version": 1})
    body = {"targets": [{"deployment": "d"}], "default_timeout_ms": 500}
    made = await call("PUT", "/v1/endpoints/e", body, status=201)
    assert (made["default_timeout_ms"], made["previous"]) == (500, [])
    stale = {"headers": {"If-Match": "999"}}
    await call("PUT", "/v1/endpoints/e", body, status=412, **stale)
    assert len((await call("GET", "/v1/endpoints"))["items"]) == 1
    await call("DELETE", "/v1/endpoints/e", status=204)
    await call("DELETE", "/v1/endpoints/e", status=404)


async def test_revision_rises_with_every_change_and_only_then(call):
    async def revision() -> int:
        return int((await call("GET", "/v1/intention"))["revision"])

    assert await revision() == 0
    await call.upload(onnx_bytes())
    assert await revision() == 0, "an upload alone is no change"
    await call.register("digits", onnx_bytes())
    assert await revision() == 1
    await call("POST", "/v1/deploy", {"model": "digits"})
    assert await revision() == 2, "one transaction, one step"
    await call("PATCH", "/v1/deployments/digits-v1", {})
    assert await revision() == 2


async def test_both_databases_sort_names_in_the_same_order(call):
    """PostgreSQL sorts by the rules of a language: "a-c" may come after "ab"."""
    for model in ("ab", "a-c"):
        await call.register(model, onnx_bytes())
        await call("POST", "/v1/deploy", {"model": model})
    state = await call("GET", "/v1/intention")
    assert [version["model"] for version in state["versions"]] == ["a-c", "ab"]
    assert [each["name"] for each in state["deployments"]] == ["a-c-v1", "ab-v1"]
    assert [each["name"] for each in state["endpoints"]] == ["a-c", "ab"]


async def test_it_survives_a_restart(opened):
    async with opened() as call:
        await call.register("digits", onnx_bytes(), metadata={"trained_at": "2025-05-04T03:02:01+02:00"})
        await call("POST", "/v1/deploy", {"model": "digits"})
        before = await call("GET", "/v1/intention")
    async with opened() as call:
        assert await call("GET", "/v1/intention") == before


async def test_health_metrics_docs_and_token(call):
    ready = await call("GET", "/health/ready")
    assert ready == {"status": "ready", "problems": {}}, "an absent broker is no reason not to serve"
    await call("GET", "/v1/models", status=401, headers={"Authorization": "Bearer wrong"})
    await call("GET", "/v1/models/absent", status=404)
    metrics = (await call.http.get("/metrics")).text
    assert "tidegate_registry_artifact_bytes 0.0" in metrics
    assert 'tidegate_registry_requests_total{method="GET",route="/v1/models/{name}",status="404"}' in metrics
    schema = await call("GET", "/openapi.json")
    put = schema["paths"]["/v1/deployments/{name}"]["put"]["requestBody"]["content"]["application/json"]
    assert "min_replicas" in put["schema"]["properties"]


AS = {scope: Principal("k", "somebody", frozenset({scope})).to_header() for scope in SCOPES}


@pytest.mark.parametrize("word", ["override", "settle", "quota", "table", "policy"])
async def test_a_word_of_a_route_is_a_valid_name(call, word):
    await call.register("digits", onnx_bytes())
    as_ = {scope: {"headers": {"X-Tidegate-Principal": header}} for scope, header in AS.items()}
    deployment, endpoint = f"/v1/deployments/{word}", f"/v1/endpoints/{word}"
    stated = {"model": "digits", "version": 1}
    await call("PUT", deployment, stated, status=403, **as_["operate"])
    await call("PUT", deployment, stated, status=201, **as_["publish"])
    targets = {"targets": [{"deployment": word}]}
    await call("PUT", endpoint, targets, status=403, **as_["operate"])
    seen = await call("PUT", endpoint, targets, status=201, **as_["publish"])
    assert await call("GET", endpoint, **as_["operate"]) == seen
    await call("PUT", f"{deployment}/override", {"replicas": 1}, status=403, **as_["publish"])
    assert (await call("PUT", f"{deployment}/override", {"replicas": 1}, **as_["operate"]))["override"]
    await call("DELETE", f"{deployment}/override", **as_["operate"])
    await call("POST", f"{endpoint}/settle", status=403, **as_["publish"])
    assert (await call("POST", f"{endpoint}/settle", **as_["operate"]))["previous"] == []
    await call("DELETE", endpoint, status=204, **as_["publish"])
    await call("DELETE", deployment, status=204, **as_["admin"])


async def test_an_operator_changes_how_a_deployment_scales_and_not_what_it_runs(call):
    await call.register("digits", onnx_bytes())
    await call("PUT", "/v1/deployments/d", {"model": "digits", "version": 1}, status=201)
    operator = {"headers": {"X-Tidegate-Principal": AS["operate"]}}
    await call("PATCH", "/v1/deployments/d", {"max_replicas": 2}, status=403, **operator)
    changed = await call("PATCH", "/v1/deployments/d/policy", {"max_replicas": 2}, **operator)
    assert changed["max_replicas"] == 2
    for other in ({"env": {"A": "b"}}, {"version": 2}, {"max_replicas": 3, "threads": 2}, {"name": "e"}):
        refused = await call("PATCH", "/v1/deployments/d/policy", other, status=400, **operator)
        assert "A policy has the fields" in refused["error"]
    assert await call("GET", "/v1/deployments/d") == changed


async def test_only_services_themselves_read_digests_and_quotas(call):
    admin = {"headers": {"X-Tidegate-Principal": AS["admin"]}}
    for path in ("/v1/keys/table", "/v1/usage/k/quota?day=2026-01-01"):
        await call("GET", path, status=403, **admin)
        await call("GET", path, status=200)
    await call("GET", "/v1/keys/table%0A", status=400, **admin)


async def test_a_dry_run_shows_what_would_change_and_changes_nothing(call):
    await call.register("digits", onnx_bytes())
    await call.register("digits", onnx_bytes(2))
    deployment = {"name": "d", "model": "digits", "version": 1, "env": {"A": "secret"}}
    endpoint = {"name": "e", "targets": [{"deployment": "d"}]}
    new = await call("POST", "/v1/apply/dry-run", {"deployments": [deployment], "endpoints": [endpoint]})
    assert [(each["action"], each["changes"]) for each in new["items"]] == [("created", [])] * 2
    assert (await call("GET", "/v1/deployments"))["items"] == []
    stated = {"deployments": [deployment], "endpoints": [endpoint]}
    assert await call("POST", "/v1/apply", stated) == new, "the same outcome, also the revision"

    await call("PUT", "/v1/models/digits/aliases/champion", {"version": 1})
    changed = {
        "deployments": [deployment | {"max_replicas": 3, "env": {"A": "other", "B": ""}}],
        "endpoints": [endpoint],
        "models": [{"name": "digits", "aliases": {"champion": 2}, "retention": {"keep_last": 5}}],
    }
    before = [
        await call("GET", path) for path in ("/v1/desired-state", "/v1/audit", "/v1/models/digits/policy")
    ]
    planned = await call("POST", "/v1/apply/dry-run", changed)
    assert before == [
        await call("GET", path) for path in ("/v1/desired-state", "/v1/audit", "/v1/models/digits/policy")
    ]
    assert [(each["kind"], each["action"]) for each in planned["items"]] == [
        ("model", "updated"), ("deployment", "updated"), ("endpoint", "unchanged"),
    ]  # fmt: skip
    assert [
        [(change["field"], change["before"], change["after"]) for change in each["changes"]]
        for each in planned["items"]
    ] == [
        [("retention.keep_last", None, 5), ("aliases.champion", 1, 2)],
        [
            ("max_replicas", 1, 3),
            ("env.A", "(hidden)", "(hidden, changed)"),
            ("env.B", None, "(hidden)"),
        ],
        [],
    ]
    assert (await call("POST", "/v1/apply", changed))["items"] == planned["items"]
    broken = {"endpoints": [{"name": "e", "targets": [{"deployment": "absent"}]}]}
    await call("POST", "/v1/apply/dry-run", broken, status=400)


async def test_apply_can_delete_what_the_file_does_not_name(call):
    await call.register("digits", onnx_bytes())
    await call.register("digits", onnx_bytes(2))
    await call("POST", "/v1/deploy", {"model": "digits", "version": 1})
    await call("POST", "/v1/deploy", {"model": "digits", "version": 2, "endpoint": "second"})
    endpoint = {"name": "digits", "targets": [{"deployment": "d"}]}
    deployment = {"name": "d", "model": "digits", "version": 2}
    stated = {"deployments": [deployment], "endpoints": [endpoint], "prune": True}
    planned = await call("POST", "/v1/apply/dry-run", stated)
    assert [(each["kind"], each["name"], each["action"]) for each in planned["items"]] == [
        ("deployment", "d", "created"),
        ("endpoint", "digits", "updated"),
        ("endpoint", "second", "deleted"),
        ("deployment", "digits-v1", "kept"),
        ("deployment", "digits-v2", "deleted"),
    ]
    assert "still used by Endpoint 'digits'" in planned["items"][3]["reason"]
    assert len((await call("GET", "/v1/endpoints"))["items"]) == 2, "a dry run deletes nothing"
    shown = ["deployment digits-v2"]  # the endpoint `second` was made later
    conflict = await call("POST", "/v1/apply", {**stated, "deletions": shown}, status=409)
    assert "would now also delete 'endpoint second'" in conflict["error"]
    assert len((await call("GET", "/v1/endpoints"))["items"]) == 2
    shown.append("endpoint second")
    assert await call("POST", "/v1/apply/dry-run", {**stated, "deletions": shown}) == planned
    assert await call("POST", "/v1/apply", stated) == planned
    settled = {**stated, "endpoints": [endpoint | {"previous": []}]}
    await call("POST", "/v1/apply", settled)
    state = await call("GET", "/v1/desired-state")
    assert [each["name"] for each in state["deployments"]] == ["d"]
    assert [each["name"] for each in state["endpoints"]] == ["digits"]
    again = await call("POST", "/v1/apply", settled)
    assert {each["action"] for each in again["items"]} == {"unchanged"}
    assert again["revision"] == state["revision"]
    assert len((await call("GET", "/v1/models/digits/versions"))["items"]) == 2, "no version is deleted"
    deleted = (await call("GET", "/v1/audit"))["items"]
    assert {each["name"] for each in deleted if each["action"] == "deleted"} == {
        "second", "digits-v1", "digits-v2",
    }  # fmt: skip
    refused = await call("POST", "/v1/apply", {"models": [{"name": "digits"}], "prune": True}, status=400)
    assert "prune would delete all of them" in refused["error"]


async def test_apply_shows_what_changes_beside_the_objects_of_the_file(call):
    """The old target goes to sleep, and a Deployment that the file names belongs to the file from now on."""
    await call.register("digits", onnx_bytes())
    await call.register("digits", onnx_bytes(2))
    first = await call("POST", "/v1/deploy", {"model": "digits", "version": 1})
    options = {"min_replicas": 1, "max_replicas": 2}
    old = first["deployment"]["name"]
    await call("PATCH", f"/v1/deployments/{old}", options)
    deployment = {"name": "d", "model": "digits", "version": 2}
    endpoint = {"name": "digits", "targets": [{"deployment": "d"}], "previous": []}
    planned = await call("POST", "/v1/apply/dry-run", {"deployments": [deployment], "endpoints": [endpoint]})
    shown = {(each["name"], each["action"]): each["changes"] for each in planned["items"]}
    assert list(shown) == [("d", "created"), ("digits", "updated"), (old, "updated")]
    assert {"field": "min_replicas", "before": 1, "after": 0} in shown[old, "updated"]
    stored = await call("GET", f"/v1/deployments/{old}")
    fields = {name: stored[name] for name in ("name", "model", "version", *options)}
    adopted = await call("POST", "/v1/apply/dry-run", {"deployments": [fields]})
    assert adopted["items"][0]["changes"][0] == {"field": "declared", "before": False, "after": True}
