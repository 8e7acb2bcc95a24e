"""From the command line to a version: names as Triton has them, refusals before the upload, two at once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.e2e.conftest import REPO, Stack
from tidegate import Client

pytestmark = pytest.mark.e2e

IDENTITY = REPO / "examples" / "python-model" / "identity"
NAME = "Add_sub.v2"
# The configuration and the model of Triton's example add_sub, for its Python backend.
CONFIG = f"""
name: "{NAME}"
backend: "python"
input [
  {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ 4 ] }},
  {{ name: "INPUT1" data_type: TYPE_FP32 dims: [ 4 ] }}
]
output [
  {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 4 ] }},
  {{ name: "OUTPUT1" data_type: TYPE_FP32 dims: [ 4 ] }}
]
instance_group [ {{ kind: KIND_CPU }} ]
"""
MODEL = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            a = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            b = pb_utils.get_input_tensor_by_name(request, "INPUT1").as_numpy()
            outputs = [pb_utils.Tensor("OUTPUT0", a + b), pb_utils.Tensor("OUTPUT1", a - b)]
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return responses
"""
A, B = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
INPUTS = {"INPUT0": A, "INPUT1": B}


@pytest.fixture(scope="module")
def example(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Triton's example, deployed by its folder alone."""
    folder = tmp_path_factory.mktemp("models") / NAME
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "1" / "model.py").write_text(MODEL)
    placed = stack.cli("deploy", str(folder))
    assert placed["deployment"]["name"] == f"{NAME}-v1"
    return NAME


def test_an_example_of_triton_is_served_under_its_own_name(
    stack: Stack, example: str, client: Client
) -> None:
    answer = client.infer(example, INPUTS)
    assert answer["OUTPUT0"].tolist() == (A + B).tolist()
    with triton.InferenceServerClient(stack.settings.gateway_grpc_target) as grpc:
        assert grpc.is_model_ready(example)
        sent = [triton.InferInput(name, [4], "FP32").set_data_from_numpy(x) for name, x in INPUTS.items()]
        found = grpc.infer(example, sent, client_timeout=60)
    assert found.as_numpy("OUTPUT1").tolist() == (A - B).tolist()
    job = client.submit(example, INPUTS)
    assert job.result(timeout_s=60)["OUTPUT0"].tolist() == (A + B).tolist()
    url = f"{stack.settings.gateway_url}/v2/models/{example}"
    assert httpx.get(f"{url}/versions/1/ready", timeout=120).status_code == 200
    assert httpx.get(f"{url}/config", timeout=120).json()["name"] == example
    assert example in {each["name"] for each in stack.cli("models")["items"]}
    assert stack.run("logs", f"{example}-v1").returncode == 0


def registered(stack: Stack, model: str) -> list[int]:
    """The versions that the registry has of a model."""
    url = f"{stack.settings.registry_url}/v1/models/{model}"
    answer = httpx.get(url, headers={"Authorization": f"Bearer {stack.settings.service_token}"}, timeout=120)
    return [] if answer.status_code == 404 else list(answer.json()["versions"])


def test_a_key_that_may_not_publish_is_told_so_before_the_upload(stack: Stack, tmp_path: Path) -> None:
    key = stack.cli("keys", "create", "infers-only", "--scope", "infer")["key"]
    remote = Stack(stack.settings, stack.env | {"TIDEGATE_API_KEY": key})
    path = tmp_path / "model.py"
    path.write_text(f"# nobody else's\n{(IDENTITY / 'model.py').read_text()}")
    done = remote.run(
        "deploy", str(path), "--name", "forbidden", "--signature", str(IDENTITY / "signature.json")
    )
    assert done.returncode != 0
    assert "without a reason" not in done.stderr
    assert "publish" in done.stderr, done.stderr
    url = f"{stack.settings.registry_url}/v1/artifacts/{hashlib.sha256(path.read_bytes()).hexdigest()}"
    headers = {"Authorization": f"Bearer {stack.settings.service_token}"}
    assert httpx.head(url, headers=headers, timeout=120).status_code == 404, "nothing was uploaded"


def test_a_file_is_uploaded_in_parts_with_a_key(stack: Stack, tmp_path: Path) -> None:
    """The SDK sends it through the gateway; the second time it sends nothing."""
    key = stack.cli("keys", "create", "uploads", "--scope", "publish")["key"]
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(20 * 2**20))
    with Client(stack.settings.gateway_url, timeout_s=120, api_key=key) as client:
        offsets: list[int] = []
        done = client.upload(path, progress=lambda offset, _: offsets.append(offset))
        assert (done["state"], done["size"]) == ("stored", 20 * 2**20)
        assert offsets == [0, 8 * 2**20, 16 * 2**20, 20 * 2**20]
        offsets.clear()
        assert client.upload(path, progress=lambda offset, _: offsets.append(offset))["state"] == "stored"
        assert offsets == [20 * 2**20]


def test_two_deploys_of_one_name_at_once_claim_no_version_together(stack: Stack, tmp_path: Path) -> None:
    def begin(seed: int) -> subprocess.Popen[str]:
        path = tmp_path / f"{seed}.py"
        path.write_text(f"# {seed}\n{(IDENTITY / 'model.py').read_text()}")
        words = [
            "deploy",
            str(path),
            "--name",
            "raced",
            "--signature",
            str(IDENTITY / "signature.json"),
            "--json",
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "tidegate.cli", *words], env=stack.env, cwd=REPO, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    served: dict[str, Any] = {}
    for process in [begin(seed) for seed in (1, 2)]:
        out, err = process.communicate(timeout=180)
        if process.returncode == 0:
            placed = json.loads(out)
            assert placed["deployment"]["version"] == placed["version"]["number"]
            assert placed["deployment"]["name"] not in served
            served[placed["deployment"]["name"]] = placed
        else:
            assert process.returncode == 7, err
            assert "another deploy has pointed endpoint raced to raced-v" in err
    assert registered(stack, "raced") == [1, 2]
    endpoint = httpx.get(
        f"{stack.settings.registry_url}/v1/endpoints/raced",
        headers={"Authorization": f"Bearer {stack.settings.service_token}"},
        timeout=120,
    ).json()
    assert {each["deployment"] for each in endpoint["targets"]} <= served.keys()
