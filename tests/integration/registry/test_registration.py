"""Refusals before an upload and before a version exists, and uploads that are an existing version."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.integration.registry.onnx_files import model, onnx_bytes, value
from tidegate.kernel.profiles.baseline import training_baseline
from tidegate.kernel.profiles.columns import Columns

SIGNATURE: dict[str, Any] = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [4]}],
    "max_batch_size": 8,
}
CODE = b"class TritonPythonModel:\n    def execute(self, requests): ...\n"


async def check(call: Any, name: str = "m", status: int = 200, **body: Any) -> Any:
    return await call("POST", f"/v1/models/{name}/check", {"filename": "m.onnx"} | body, status=status)


async def test_a_check_changes_nothing_and_says_what_is_known(call):
    before = await call("GET", "/v1/intention")
    assert await check(call, size=10) == {
        "format": "onnx", "stored": False, "version": None, "warnings": [],
    }  # fmt: skip
    assert await call("GET", "/v1/intention") == before
    made = await call.register("m", onnx_bytes(1))
    known = await check(call, artifact=made["artifact_sha256"])
    assert (known["stored"], known["version"]["number"]) == (True, 1)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("-m", {}, "not a valid name of a model: use 1 to 63 letters"),
    ("stats", {}, "is another route"),
    ("m" * 62, {}, "longer than 63 characters"),
    ("m", {"filename": "a/m.onnx"}, "not a plain file name"),
    ("m", {"filename": "m.joblib"}, "allow_pickle=true"),
    ("m", {"filename": "m.pt"}, "Add a signature"),
    ("m", {"signature": SIGNATURE | {"inputs": SIGNATURE["inputs"] * 2}}, "'x' more than once"),
    ("m", {"requirements": ["-r other.txt"]}, "the option '-r' does not work"),
    ("m", {"deployment": {"min_replicas": 5, "max_replicas": 2}}, "min_replicas 5 is above"),
    ("m", {"deployment": {"thraeds": 5}}, "there is no field 'thraeds'"),
    ("m", {"endpoint": "a/b"}, "endpoint"),
]


async def test_what_is_refused_before_the_upload(call):
    for name, body, words in REFUSED:
        answer = await check(call, name, 400, **body)
        assert words in answer["error"], answer


async def test_a_size_beyond_the_limit_is_refused_before_the_upload(opened):
    async with opened(max_artifact_bytes=100) as call:
        assert "the limit is 100" in (await check(call, status=413, size=101))["error"]
        await check(call, size=100)


async def test_a_refused_registration_uses_no_version_number(call):
    digest = await call.upload(CODE)
    body = {"artifact": digest, "filename": "model.py"}
    refused = await call("POST", "/v1/models/m/versions", body, status=400)
    assert "Add a signature" in refused["error"]
    assert "Add a signature" in (await check(call, status=400, **body))["error"], "its bytes are here"
    await call("GET", "/v1/models/m", status=404)
    made = await call("POST", "/v1/models/m/versions", body | {"signature": SIGNATURE}, status=201)
    assert made["number"] == 1


async def test_a_breaking_signature_needs_consent(call):
    await call.register("m", onnx_bytes(1))
    wider = model(outputs=[value("y", "batch", 64), value("z", "batch", 1)])
    assert (await call.register("m", wider.SerializeToString()))["number"] == 2
    other = model(inputs=[value("image", "batch", 64)]).SerializeToString()
    body = {"artifact": await call.upload(other), "filename": "m.onnx"}
    for path in ("check", "versions"):
        refused = await call("POST", f"/v1/models/m/{path}", body, status=409)
        assert refused["reason"] == "breaking_change"
        assert "version 2 of model 'm': input 'x' is removed; input 'image' is new" in refused["error"]
    assert (await call("GET", "/v1/models/m"))["versions"] == [1, 2]
    taken = await call("POST", "/v1/models/m/versions", body | {"breaking": True}, status=201)
    assert taken["number"] == 3
    back = await call.register("m", onnx_bytes(1))
    assert back["number"] == 1, "an older version's bytes are no new version"


async def test_the_publisher_of_a_pickle_gets_warnings(opened, tmp_path):
    site = tmp_path / "runtime" / "model-env" / "lib" / "python3.11" / "site-packages"
    for package in ("scikit_learn-1.5.0", "numpy-1.26.4"):
        (site / f"{package}.dist-info").mkdir(parents=True)
    file = Path(__file__).parents[1] / "worker" / "numpy_2" / "network.pkl"
    async with opened(runtime_dir=tmp_path / "runtime") as call:
        made = await call.register("m", file.read_bytes(), "network.pkl", allow_pickle=True)
        assert len(made["warnings"]) == 2
        assert "saved with scikit-learn 1.9.1, and models here run with 1.5.0" in made["warnings"][0]
        assert "saved with numpy 2, and models here run with numpy 1.26.4" in made["warnings"][1]
        body = {"artifact": made["artifact_sha256"], "filename": "network.pkl", "allow_pickle": True}
        pinned = await check(call, **body, requirements=["scikit-learn==1.9.1"])
        assert [warning.partition(" with ")[2][:7] for warning in pinned["warnings"]] == ["numpy 2"]


async def test_names_of_triton_and_kserve_are_accepted(call):
    made = await call.register("simple_identity.V2", onnx_bytes(1))
    placed = await call("POST", "/v1/deploy", {"model": made["model"]})
    assert placed["deployment"]["name"] == "simple_identity.V2-v1"
    assert placed["endpoint"]["name"] == "simple_identity.V2"
    clash = await check(call, "Simple_Identity.v2", 409)
    assert "differs from it only by case" in clash["error"]
    digest = hashlib.sha256(onnx_bytes(1)).hexdigest()
    body = {"artifact": digest, "filename": "m.onnx"}
    await call("POST", "/v1/models/SIMPLE_identity.v2/versions", body, status=409)


async def test_concurrent_registrations_of_other_bytes_have_a_version_each_and_of_the_same_bytes_share_it(
    call,
):
    contents = [onnx_bytes(1), onnx_bytes(2), onnx_bytes(1)]
    made = await asyncio.gather(*(call.register("m", content) for content in contents))
    assert made[0]["number"] == made[2]["number"] != made[1]["number"]
    placed = await asyncio.gather(
        *(call("POST", "/v1/deploy", {"model": "m", "version": each["number"]}) for each in made)
    )
    assert [each["deployment"]["version"] for each in placed] == [each["number"] for each in made]


async def test_a_training_baseline_is_kept_until_its_version_is_deleted(call):
    baseline = training_baseline(Columns(100, {"x": np.arange(100.0)})).to_json()
    path = "/v1/models/m/versions/1/baseline"
    await call("PUT", path, baseline, status=404)
    await call.register("m", onnx_bytes(1))
    assert "--baseline" in (await call("GET", path, status=404))["error"]
    assert "not a baseline" in (await call("PUT", path, {"v": 2}, status=400))["error"]
    await call("PUT", path, baseline)
    assert await call("GET", path) == baseline
    other = training_baseline(Columns(50, {"x": np.arange(50.0)})).to_json()
    await call("PUT", path, other)
    assert await call("GET", path) == other
    entries = (await call("GET", "/v1/audit"))["items"]
    assert any("baseline_sha256" in (each["after"] or {}) for each in entries)
    await call("DELETE", path, status=204)
    await call("DELETE", path, status=404)
    await call("PUT", path, baseline)
    await call("DELETE", "/v1/models/m/versions/1", status=204)
    await call("GET", path, status=404)
