"""Five bad versions of a model that serves: none of them gets a request, and each is told apart.

Each is deployed with the CLI, as users do. Meanwhile callers go on, and only the first version answers them.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Stack, running_stack

SIGNATURE = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}],
    "max_batch_size": 8,
}
MODEL = """
import os
import numpy as np
import triton_python_backend_utils as pb_utils
{imports}


class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(each, "x").as_numpy() for each in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", {y})]) for x in inputs]
"""
SAMPLE = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [3]}]}
GOLDEN = SAMPLE | {"expected": {"y": [6]}, "tolerance": 0.001}
# What is wrong with each version, the options of its deploy, and the words that the user reads.
BAD: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "missing dependency": (
        {"imports": "import lightgbm_of_nobody"},
        (),
        ("No module named 'lightgbm_of_nobody'", "requirements.txt"),
    ),
    "wrong shape": (
        {"y": "np.concatenate([x, x], axis=1)"},
        (),
        ("contradicts the signature", "FP32 [1, 2]"),
    ),
    "wrong golden output": ({"y": "x * 3"}, ("--check", "golden.json"), ("y[0] is 9.0, expected 6",)),
    "crash at load": ({"initialize": "os._exit(13)"}, (), ("ended while it loaded", "2 tries")),
    "out of memory": (
        {"initialize": "self.kept = np.ones(1_000_000_000, dtype=np.uint8)"},
        ("--resource", "memory_mb=400"),
        ("out of memory", "limit of 400 MiB"),
    ),
}


def model(folder: Path, *, imports: str = "", initialize: str = "pass", y: str = "x * 2") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL.format(imports=imports, initialize=initialize, y=y))
    (folder / "signature.json").write_text(json.dumps(SIGNATURE))
    (folder / "golden.json").write_text(json.dumps(GOLDEN))
    return folder


@pytest.fixture(scope="module")
def verifying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that verifies versions, as it does by default."""
    with running_stack(tmp_path_factory.mktemp("verifying") / "state", verification="on") as found:
        yield found


def deploy(stack: Stack, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    given = ("--name", "m", "--signature", "signature.json", *options, "--json")
    return stack.run("deploy", "model.py", *given, cwd=folder, timeout_s=600)


class Callers:
    """A thread that calls the model all the time, until the end of the block. It keeps every answer."""

    def __init__(self, stack: Stack) -> None:
        self._url = f"{stack.settings.gateway_url}/v2/models/m/infer"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers: list[tuple[int, Any]] = []

    def __enter__(self) -> Callers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(trust_env=False, timeout=60) as http:
            while not self._ended.wait(0.05):
                answer = http.post(self._url, json=SAMPLE)
                outputs = answer.json().get("outputs", [{}])
                self.answers.append((answer.status_code, outputs[0].get("data")))


def test_none_of_five_bad_versions_gets_a_request_and_the_user_reads_why(verifying: Stack, tmp_path: Path):
    stack = verifying
    first = deploy(stack, model(tmp_path / "good"), "--check", "golden.json")
    assert first.returncode == 0, first.stderr
    assert "verify: done (verified:" in first.stderr
    folders = {what: model(tmp_path / what.replace(" ", "-"), **wrong) for what, (wrong, _, _) in BAD.items()}
    with Callers(stack) as callers, ThreadPoolExecutor(len(BAD)) as pool:
        outcomes = dict(
            zip(BAD, pool.map(lambda what: deploy(stack, folders[what], *BAD[what][1]), BAD), strict=True)
        )
    for what, (_, _, told) in BAD.items():
        done = outcomes[what]
        assert done.returncode == 4, f"{what}: {done.stdout}\n{done.stderr}"
        said = json.loads(done.stdout)
        assert said["reason"] == "version_rejected", what
        for words in (*told, "was rejected", "It got no request", "--force"):
            assert words in said["error"], f"{what}: {said['error']}"
    assert callers.answers
    assert set(map(str, callers.answers)) == {str((200, [6.0]))}, "only the first version answered"

    versions = stack.cli("versions", "m")["items"]
    states = [each["verification"]["state"] for each in versions]
    assert states == ["verified", *["rejected"] * len(BAD)]
    deployments = {each["deployment"] for each in stack.cli("deployments")["items"]}
    assert deployments == {"m-v1"}, "no replica of a rejected version ever had a queue"
    card = versions[0]["verification"]["card"]
    assert card["requests_per_s"] > 0
    assert card["memory_mb"] > 0
    assert [each["rows"] for each in card["batches"]] == [1, 8]
    assert card["cpu"]
    assert not stack.autoscaler("/v1/verifications")["items"]
    (replica,) = stack.replicas("m-v1")
    assert not replica.get("death"), "no process of its verification counts as one of its own"


def test_a_rejected_version_serves_only_if_forced(verifying: Stack):
    """The version with the wrong golden output can load, so it can be forced."""
    wrong = next(
        each["number"]
        for each in verifying.cli("versions", "m")["items"]
        if "expected 6" in each["verification"]["message"]
    )
    refused = verifying.run("deploy", "m", "--version", str(wrong), "--json")
    assert refused.returncode == 4
    verifying.cli("deploy", "m", "--version", str(wrong), "--force", "--no-wait")
    spec = next(
        each for each in verifying.cli("audit", "--limit", "20")["items"] if each["name"] == f"m-v{wrong}"
    )
    assert spec["after"]["unverified"] is True
