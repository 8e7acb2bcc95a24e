"""Clients of other systems, unmodified, against the served example: their answers equal onnxruntime's."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from benchmarks import places
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Digits, Stack

pytestmark = pytest.mark.e2e

ROWS = 7
TOLERANCE = 1e-5
# The last release of protobuf that reads modules as old as the client's has no compiled part.
TF_CLIENT = {
    "min-tfs-client==1.0.2": "2e0bd3ea0d7fd96c22d043135171726f2fc6bb72c555f617ef9ebf4ab53c5a75",
    "protobuf==3.20.3": "a7ca6d488aa8ff7f329d4c545b2dbad8ac31464f1d8b1c87ad1346717731e4db",
}


@pytest.fixture
def http(stack: Stack, served: str) -> httpx.Client:
    return httpx.Client(base_url=stack.settings.gateway_url, timeout=60)


@pytest.fixture
def rows(digits: Digits) -> list[list[float]]:
    found: list[list[float]] = digits.images[:ROWS].tolist()
    return found


def same(digits: Digits, labels: Any, probabilities: Any) -> None:
    assert list(labels) == digits.labels[:ROWS].tolist()
    assert np.abs(np.asarray(probabilities) - digits.probabilities[:ROWS]).max() < TOLERANCE


def test_tensorflow_serving_and_kserve(http: httpx.Client, digits: Digits, rows: list[list[float]]):
    predictions = http.post("/v1/models/digits:predict", json={"instances": rows}).json()["predictions"]
    same(digits, [p["label"] for p in predictions], [p["probabilities"] for p in predictions])
    body = {"signature_name": "serving_default", "inputs": {"image": rows}}
    outputs = http.post("/v1/models/digits/versions/1:predict", json=body).json()["outputs"]
    same(digits, outputs["label"], outputs["probabilities"])
    examples = {"examples": [{"image": row} for row in rows]}
    results = http.post("/v1/models/digits/labels/stable:classify", json=examples).json()["results"]
    assert [max(each, key=lambda pair: pair[1])[0] for each in results] == [
        str(label) for label in digits.labels[:ROWS]
    ]
    numbers = http.post("/v1/models/digits:regress", json=examples).json()["results"]
    assert numbers == digits.labels[:ROWS].tolist()


@pytest.fixture(scope="module")
def tf_client() -> Path:
    """Return the folder with a client of TensorFlow Serving. It is fetched once: 540 KB."""
    folder = places.bench_dir() / "env" / "tf-client"
    if not (folder / "min_tfs_client").is_dir():
        wanted = folder.with_suffix(".txt")
        wanted.parent.mkdir(parents=True, exist_ok=True)
        wanted.write_text("".join(f"{name} --hash=sha256:{sha}\n" for name, sha in TF_CLIENT.items()))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*pip, "--require-hashes", "-r", str(wanted)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"min-tfs-client cannot be installed: {done.stderr.strip()[-200:]}")
    return folder


def test_tensorflow_servings_client_over_grpc(
    stack: Stack, served: str, tf_client: Path, digits: Digits, rows: list[list[float]]
):
    script = Path(__file__).with_name("use_tf_serving.py")
    given = {"address": stack.settings.gateway_grpc_target, "rows": rows}
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(given), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tf_client)}, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    same(digits, found["label"], found["probabilities"])
    assert np.abs(np.array(found["classes"]) - digits.probabilities[:ROWS]).max() < TOLERANCE
    assert found["numbers"] == digits.labels[:ROWS].tolist()
    assert (found["version"], found["image"], found["states"]) == (1, [1, [-1, 64]], [[1, "AVAILABLE"]])
    assert found["unknown"][0] == "NOT_FOUND"


def test_a_label_is_an_alias_of_a_version(
    stack: Stack, http: httpx.Client, digits: Digits, rows: list[list[float]]
):
    unknown = http.post("/v1/models/digits/labels/champion:predict", json={"instances": rows})
    assert (unknown.status_code, "stable" in unknown.json()["error"]) == (404, True)
    stack.cli("alias", "set", "digits", "champion", "latest")
    end = time.monotonic() + PATIENCE_S
    path = "/v1/models/digits/labels/champion:predict"
    while (answer := http.post(path, json={"instances": rows})).status_code == 404:
        assert time.monotonic() < end, answer.text
        time.sleep(0.1)
    predictions = answer.json()["predictions"]
    same(digits, [p["label"] for p in predictions], [p["probabilities"] for p in predictions])
    ready = http.get("/v2/models/digits/versions/champion/ready")
    assert ready.status_code == 200, "the label is a version of every API"
    stack.cli("alias", "delete", "digits", "champion")


def test_tensorflow_servings_status_metadata_and_errors(http: httpx.Client, rows: list[list[float]]):
    status = http.get("/v1/models/digits").json()
    assert (status["name"], status["ready"]) == ("digits", True)
    assert [(each["version"], each["state"]) for each in status["model_version_status"]] == [
        ("1", "AVAILABLE")
    ]
    signature = http.get("/v1/models/digits/metadata").json()["metadata"]["signature_def"]["signature_def"]
    image = signature["serving_default"]["inputs"]["image"]
    assert (image["dtype"], [dim["size"] for dim in image["tensor_shape"]["dim"]]) == (
        "DT_FLOAT",
        ["-1", "64"],
    )
    for path, body, code, text in (
        ("digits:predict", {"instances": [[1, 2]]}, 400, "input 'image'"),
        ("digits:predict", {"rows": rows}, 400, "'instances'"),
        ("digits:predict", {"signature_name": "x", "instances": rows}, 400, "signature"),
        ("nobody:predict", {"instances": rows}, 404, "nobody"),
        ("digits/versions/9:predict", {"instances": rows}, 404, "9"),
        ("digits/labels/beta:predict", {"instances": rows}, 404, "label"),
    ):
        answer = http.post(f"/v1/models/{path}", json=body)
        assert (answer.status_code, text in answer.json()["error"]) == (code, True), answer.text


def test_torchserve(http: httpx.Client, digits: Digits, rows: list[list[float]]):
    outputs = http.post("/predictions/digits/1.0", json=rows).json()
    same(digits, outputs["label"], outputs["probabilities"])
    one = http.post("/predictions/digits", json={"data": rows[:1]}).json()
    assert one["label"] == digits.labels[0]
    assert http.get("/ping").json() == {"status": "Healthy"}
    assert {"modelName": "digits", "modelUrl": "digits"} in http.get("/models").json()["models"]
    end = time.monotonic() + PATIENCE_S
    while not (described := http.get("/models/digits").json()[0])["workers"]:
        assert time.monotonic() < end, "the gateway does not learn of the replica"
        time.sleep(0.1)
    assert (described["modelVersion"], len(described["workers"])) == ("1.0", 1)
    unknown = http.post("/predictions/nobody", json=rows)
    assert (unknown.status_code, unknown.json()["type"]) == (404, "ModelNotFoundException")
    removed = http.delete("/models/digits")
    assert (removed.status_code, "tidegate delete" in removed.json()["message"]) == (400, True)


def test_torchserves_scaling_needs_an_operator(stack: Stack, http: httpx.Client):
    workers: dict[str, str] = {"min_worker": "1", "synchronous": "true"}
    assert http.put("/models/digits", params=workers).status_code == 401
    operator = {"Authorization": f"Bearer {stack.settings.service_token}"}
    scaled = http.put("/models/digits/1.0", params=workers, headers=operator)
    assert (scaled.status_code, scaled.json()) == (200, {"status": "Workers scaled to 1 for model: digits"})
    held = httpx.get(
        f"{stack.settings.registry_url}/v1/deployments/digits-v1", headers=operator, timeout=PATIENCE_S
    ).json()
    assert held["override"]["replicas"] == 1
    assert stack.run("scale", "digits", "--auto").returncode == 0
    unknown = http.put("/models/nobody", params=workers, headers=operator)
    assert (unknown.status_code, unknown.json()["type"]) == (404, "ModelNotFoundException")


class SageMaker:
    """The real SDK, in its environment."""

    def __init__(self, python: Path, url: str, key: str) -> None:
        self._python, self._url, self._key = python, url, key

    def invoke(self, *calls: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the answers to calls of ``invoke_endpoint``. Their bodies are bytes."""
        sent = [
            call | {"Body": base64.b64encode(call["Body"]).decode()} if "Body" in call else call
            for call in calls
        ]
        given = json.dumps({"url": self._url, "key": self._key, "calls": sent})
        script = Path(__file__).with_name("use_sagemaker.py")
        done = subprocess.run(
            [self._python, script], input=given, text=True, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found


@pytest.fixture(scope="module")
def sagemaker(stack: Stack, served: str, clients_python: Path) -> SageMaker:
    return SageMaker(clients_python, stack.settings.gateway_url, "EMPTY")


def test_sagemakers_asynchronous_inference_with_boto3(
    stack: Stack, sagemaker: SageMaker, digits: Digits, rows: list[list[float]]
):
    root = stack.async_url
    folder = Path(root.removeprefix("file://"))
    (folder / "in").mkdir(parents=True)
    (folder / "in/rows.json").write_text(json.dumps({"instances": rows}))
    (folder / "in/wrong.csv").write_text("1,2\n")
    to = {"EndpointName": "digits", "InputLocation": f"{root}/in/rows.json"}
    as_json, as_npy, wrong, missing, elsewhere, endless = sagemaker.invoke(
        to | {"ContentType": "application/json", "InferenceId": "mine-1"},
        to | {"ContentType": "application/json", "Accept": "text/csv", "RequestTTLSeconds": 600},
        to | {"ContentType": "text/csv", "InputLocation": f"{root}/in/wrong.csv"},
        to | {"InputLocation": f"{root}/in/nothing.json"},
        to | {"InputLocation": "file:///etc/passwd"},
        to | {"EndpointName": "nothing"},
    )
    assert as_json["InferenceId"] == "mine-1"
    predictions = json.loads(answer_at(as_json))["predictions"]
    same(digits, [p["label"] for p in predictions], [p["probabilities"] for p in predictions])
    assert len(answer_at(as_npy).splitlines()) == ROWS
    assert len(as_npy["InferenceId"]) == 32
    for refused, text in (
        (wrong, "cannot fill the shape"),
        (missing, "does not exist"),
        (elsewhere, "not below"),
        (endless, "no model"),
    ):
        assert text in refused["error"]["Message"], refused
    assert sorted(each.name for each in folder.iterdir()) == ["in", "tidegate-async"]


def answer_at(accepted: dict[str, Any]) -> str:
    """Wait for the answer of an asynchronous call, and return it."""
    path = Path(accepted["OutputLocation"].removeprefix("file://"))
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline
        assert not Path(accepted["FailureLocation"].removeprefix("file://")).exists()
        time.sleep(0.05)
    return path.read_text()


def test_sagemaker_with_boto3(sagemaker: SageMaker, digits: Digits, rows: list[list[float]]):
    to = {"EndpointName": "digits"}
    array = io.BytesIO()
    np.save(array, np.asarray(rows, "<f4"))
    table = "\n".join(",".join(map(repr, row)) for row in rows).encode()
    as_json, as_csv, as_lines = sagemaker.invoke(
        to | {
            "ContentType": "application/json",
            "Body": json.dumps({"instances": rows}).encode(),
            "CustomAttributes": "mine=1",
        },
        to | {"ContentType": "text/csv", "Body": table},
        to | {
            "ContentType": "application/x-npy",
            "Accept": "application/jsonlines",
            "Body": array.getvalue(),
        },
    )  # fmt: skip
    predictions = orjson.loads(base64.b64decode(as_json["Body"]))["predictions"]
    same(digits, [p["label"] for p in predictions], [p["probabilities"] for p in predictions])
    assert (as_json["ContentType"], as_json["InvokedProductionVariant"]) == ("application/json", "v1")
    assert as_json["CustomAttributes"] == "mine=1"
    cells = np.loadtxt(io.BytesIO(base64.b64decode(as_csv["Body"])), delimiter=",")
    same(digits, cells[:, 0].astype(int), cells[:, 1:])
    lines = [orjson.loads(line) for line in base64.b64decode(as_lines["Body"]).splitlines()]
    same(digits, [p["label"] for p in lines], [p["probabilities"] for p in lines])


def test_boto3_reads_the_errors(sagemaker: SageMaker):
    kind = {"ContentType": "application/json"}
    wrong, unknown = sagemaker.invoke(
        kind | {"EndpointName": "digits", "Body": b"{}"},
        kind | {"EndpointName": "nobody", "Body": b"[[1]]"},
    )
    assert wrong["error"]["Code"] == unknown["error"]["Code"] == "ValidationError"
    assert "instances" in wrong["error"]["Message"]
    assert "nobody" in unknown["error"]["Message"]


def test_sagemakers_containers(http: httpx.Client, digits: Digits, rows: list[list[float]]):
    for path, headers in (
        ("/models/digits/invoke", {}),
        ("/invocations", {"X-Amzn-SageMaker-Target-Model": "digits.tar.gz"}),
    ):
        answer = http.post(path, json={"inputs": {"image": rows}}, headers=headers)
        outputs = answer.json()["outputs"]
        same(digits, outputs["label"], outputs["probabilities"])


def test_azure_ml(http: httpx.Client, digits: Digits, rows: list[list[float]]):
    headers = {"azureml-model-deployment": "v1"}
    for body in (
        {"input_data": rows},
        {"data": rows},
        {"input_data": {"columns": list(range(64)), "data": rows}},
    ):
        answer = http.post("/endpoints/digits/score", json=body, headers=headers)
        found = answer.json()
        same(digits, [p["label"] for p in found], [p["probabilities"] for p in found])
        assert answer.headers["azureml-model-deployment"] == "v1"
    refused = http.post("/endpoints/digits/score", json={"input_data": [[1]]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_request")
