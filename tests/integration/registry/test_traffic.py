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
