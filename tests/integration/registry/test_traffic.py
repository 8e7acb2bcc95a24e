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
        assert "a rule needs a header or a tenant, and a value needs a header" in refused["error"]


async def test_a_shadow_is_started_stopped_and_promoted(call):
    for number in (1, 2):
        await call.register("digits", onnx_bytes(number))
    await call("POST", "/v1/deploy", {"model": "digits", "version": 1})
    path = "/v1/endpoints/digits/shadow"
    body = {"version": 2, "rate": 20, "tolerance": {"rtol": 0.01}, "until": "2100-01-01T00:00:00Z"}
    started = (await call("PUT", path, body))["shadow"]
    assert (started["deployment"], started["rate"], started["wake"]) == ("digits-v2", 20, False)
    assert (started["tolerance"], len(started["id"])) == ({"atol": 1e-6, "rtol": 0.01}, 8)
    assert (await call("GET", "/v1/endpoints/digits"))["shadow"] == started
    for wrong in ({}, {"version": 2, "deployment": "digits-v2"}, {"version": 1}, {"version": 2, "rate": 0}):
        await call("PUT", path, wrong, status=400)
    await call("PUT", path, {"version": 9}, status=404)
    assert (await call("DELETE", f"{path}?id=another"))["shadow"] == started
    assert (await call("DELETE", path))["shadow"] is None
    await call("POST", "/v1/endpoints/digits/rollout/promote", {}, status=404)
    await call("PUT", path, {"deployment": "digits-v2"})
    promoted = await call("POST", "/v1/endpoints/digits/rollout/promote", {})
    assert [each["deployment"] for each in promoted["targets"]] == ["digits-v2"]
    assert (promoted["shadow"], promoted["previous"][0]["deployment"]) == (None, "digits-v1")


async def test_a_model_with_many_answers_is_no_shadow(call):
    await call.register("digits", onnx_bytes(1))
    await call("POST", "/v1/deploy", {"model": "digits", "version": 1})
    side = [{"name": "x", "datatype": "FP32", "shape": [1]}]
    signature = {"inputs": side, "outputs": [{**side[0], "name": "y"}], "decoupled": True}
    content = b"class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"
    await call.register("many", content, "model.py", signature=signature)
    await call("PUT", "/v1/deployments/many-v1", {"model": "many", "version": 1})
    refused = await call("PUT", "/v1/endpoints/digits/shadow", {"deployment": "many-v1"}, status=400)
    assert "returns any number of answers to a request" in refused["error"]
    assert (await call("GET", "/v1/endpoints/digits"))["shadow"] is None, "nothing was stored"


async def test_an_experiment_is_started_completed_decided_and_stated(call):
    for number in (1, 2, 3):
        await call.register("digits", onnx_bytes(number))
    await call("POST", "/v1/deploy", {"model": "digits", "version": 1})
    path = "/v1/endpoints/digits/experiment"
    options = {"share": 40, "until": "2100-01-01T00:00:00Z", "metrics": [{"name": "score", "goal": "down"}]}
    started = await call("POST", path, {"versions": [2], "options": options}, status=201)
    experiment = started["experiment"]
    assert (experiment["control"], experiment["treatments"]) == ("digits-v1", ["digits-v2"])
    assert [(each["deployment"], each["weight"]) for each in started["targets"]] == [
        ("digits-v1", 60_000), ("digits-v2", 40_000),
    ]  # fmt: skip
    assert (await call("GET", "/v1/endpoints/digits")) == started
    await call("POST", path, {"versions": [3]}, status=409)
    await call("POST", "/v1/endpoints/digits/rollout", {"version": 3}, status=409)
    for wrong in ({}, {"versions": [0]}, {"versions": [2], "options": {"metrics": []}}):
        await call("POST", path, wrong, status=400)
    again = {key: value for key, value in started.items() if key not in ("name", "revision")}
    assert (await call("PUT", "/v1/endpoints/digits", again))["revision"] == started["revision"]

    await call("POST", f"{path}/complete", {"id": "other", "reason": "all samples"}, status=409)
    note = {"id": experiment["id"], "reason": "all samples"}
    ended = await call("POST", f"{path}/complete", note)
    assert (ended["experiment"]["phase"], len(ended["targets"])) == ("complete", 1)
    await call("POST", f"{path}/stop", {}, status=409)
    await call("POST", f"{path}/winner", {"deployment": "digits-v3"}, status=400)
    decided = await call("POST", f"{path}/winner", {"deployment": "digits-v2"})
    assert [each["deployment"] for each in decided["targets"]] == ["digits-v2"]
    await call("POST", "/v1/endpoints/digits/settle")

    stated = {"treatments": ["digits-v1"], "options": options}
    file = {"endpoints": [{"name": "digits", "targets": [{"deployment": "digits-v2"}], "experiment": stated}]}
    for action in ("updated", "unchanged"):
        assert (await call("POST", "/v1/apply", file))["items"][0]["action"] == action
    running = await call("GET", "/v1/endpoints/digits")
    assert (running["experiment"]["control"], len(running["targets"])) == ("digits-v2", 2)
    assert (await call("POST", f"{path}/stop", {}))["experiment"]["phase"] == "stopped"
