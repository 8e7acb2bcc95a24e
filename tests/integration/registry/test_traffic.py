"""Rollback with the audit log of the real database, and split traffic."""

from __future__ import annotations

from tests.integration.registry.onnx_files import onnx_bytes


async def test_a_rollback_reads_the_audit_log(call):
    for number in (1, 2, 3):
        await call.register("digits", onnx_bytes(number))
    for number in (1, 2, 3):
        options = {"threads": number, "env": {"N": str(number)}}
        await call("POST", "/v1/deploy", {"model": "digits", "version": number, "deployment": options})
        if number != 2:  # which never becomes ready
            await call("POST", "/v1/endpoints/digits/settle")
    await call("DELETE", "/v1/deployments/digits-v1")
    back = await call("POST", "/v1/endpoints/digits/rollback")
    assert back["deployment"]["name"] == "digits-v1"
    assert (back["replaced"], back["remade"]) == (["digits-v3"], True)
    assert (back["deployment"]["threads"], back["deployment"]["env"]) == (1, {"N": "3"})
    assert [target["deployment"] for target in back["endpoint"]["previous"]] == ["digits-v3"]

    again = await call("POST", "/v1/endpoints/digits/rollback")
    assert (again["deployment"]["version"], again["endpoint"]) == (1, back["endpoint"])
    await call("POST", "/v1/endpoints/digits/settle")
    refused = await call("POST", "/v1/endpoints/digits/rollback", status=409)
    assert "no older version" in refused["error"]
    forward = await call("POST", "/v1/endpoints/digits/rollback", {"version": 2})
    assert (forward["deployment"]["name"], forward["remade"]) == ("digits-v2", False)


async def test_sharing_traffic(call):
    for number in (1, 2):
        await call.register("digits", onnx_bytes(number))
    await call("POST", "/v1/deploy", {"model": "digits", "version": 1})
    idle = await call("POST", "/v1/deploy", {"model": "digits", "version": 2, "traffic": False})
    assert [target["deployment"] for target in idle["endpoint"]["targets"]] == ["digits-v1"]
    targets = [{"deployment": "digits-v1", "weight": 9}, {"deployment": "digits-v2", "weight": 1}]
    shared = await call("POST", "/v1/endpoints/digits/split", {"targets": targets})
    assert (shared["targets"], len(shared["previous"])) == (targets, 1)
    await call("POST", "/v1/endpoints/absent/split", {"targets": targets}, status=404)


async def test_rules_and_sticky_keys_are_stored(call):
    await call.register("digits", onnx_bytes(1))
    await call("POST", "/v1/deploy", {"model": "digits", "version": 1})
    spec = {
        "targets": [{"deployment": "digits-v1"}],
        "rules": [{"deployment": "digits-v1", "header": "X-Beta"}],
        "sticky": {"by": "header", "name": "X-User"},
        "when_unready": "others",
    }
    await call("PUT", "/v1/endpoints/digits", spec)
    stored = await call("GET", "/v1/endpoints/digits")
    assert stored["rules"] == [{"deployment": "digits-v1", "header": "X-Beta", "value": None, "tenant": None}]
    assert (stored["sticky"], stored["when_unready"]) == ({"by": "header", "name": "X-User"}, "others")
    gone = {**spec, "rules": [{"deployment": "absent", "header": "X-Beta"}]}
    refused = await call("PUT", "/v1/endpoints/digits", gone, status=400)
    assert "a rule names Deployment 'absent', which does not exist" in refused["error"]
    for rule in ({"deployment": "digits-v1"}, {"deployment": "digits-v1", "tenant": "k", "value": "x"}):
        refused = await call("PUT", "/v1/endpoints/digits", {**spec, "rules": [rule]}, status=400)
        assert "a rule needs a header, or a tenant without a value" in refused["error"]
