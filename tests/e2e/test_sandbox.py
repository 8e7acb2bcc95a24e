"""A hostile model in a stack with default settings, and what is left of it when its worker is killed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack
from tidegate import Client
from tidegate.kernel import model_users

SIGNATURE = {
    "inputs": [{"name": "order", "datatype": "BYTES", "shape": [1]}],
    "outputs": [{"name": "said", "datatype": "BYTES", "shape": [1]}],
    "max_batch_size": 1,
}
MODEL = """
import json, os, subprocess
import numpy as np
import triton_python_backend_utils as pb_utils


def attempt(path):
    try:
        if path.endswith("/"):
            return sorted(os.listdir(path))
        return len(open(path, "rb").read())
    except OSError as error:
        return type(error).__name__


class TritonPythonModel:
    def initialize(self, args):
        # What a hostile model would leave running: a daemon, without a mark in its environment.
        subprocess.Popen(["sleep", "3600"], env={}, start_new_session=True)

    def execute(self, requests):
        order = json.loads(pb_utils.get_input_tensor_by_name(requests[0], "order").as_numpy().ravel()[0])
        said = {name: attempt(path) for name, path in order.items()}
        said["uid"] = os.getuid()
        found = np.array([[json.dumps(said)]], object)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("said", found)]) for _ in requests]
"""


@pytest.fixture(scope="module")
def hostile(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "model.py").write_text(MODEL)
    (folder / "signature.json").write_text(json.dumps(SIGNATURE))
    options = ("--signature", str(folder / "signature.json"), "--min", "1", "--max", "1")
    stack.deploy(folder / "model.py", "hostile", *options)
    return "hostile"


def contained(stack: Stack) -> dict[str, Any]:
    (replica,) = [r for r in stack.replicas("hostile-v1") if r["state"] == "ready"]
    if replica["sandbox"].startswith("none: "):
        pytest.skip(replica["sandbox"])
    return replica


def test_the_secrets_of_a_stack(stack: Stack, client: Client, hostile: str):
    state, replica = stack.settings.state_path, contained(stack)
    order = {
        "token": f"{state}/token",
        "webhook secret": f"{state}/webhook-secret",
        "database": f"{state}/data/registry.db",
        "assignment": f"{state}/replicas/{replica['replica']}/assignment.json",
        "log": f"{state}/log/worker-{replica['replica']}.log",
        "environment of the worker": f"/proc/{replica['pid']}/environ",
        "environment of the registry": f"/proc/{stack.child('registry').pid}/environ",
        "memory": f"/proc/{replica['pid']}/mem",
        "secrets": f"{state}/secrets/",
    }
    inputs = {"order": np.array([[json.dumps(order)]], object)}
    said = json.loads(client.infer(hostile, inputs)["said"].ravel()[0])
    uid = said.pop("uid")
    assert set(said.values()) <= {"PermissionError", "FileNotFoundError"}, said
    if os.geteuid() == 0:
        assert replica["sandbox"].startswith(f"user {uid}")
        assert model_users.is_ours(uid)
    else:
        assert replica["sandbox"] == "own mounts"


@pytest.mark.skipif(os.geteuid() != 0, reason="a model has a user of its own below root only")
def test_a_killed_worker_leaves_no_process_of_its_model(stack: Stack, hostile: str):
    """Neither its Triton nor a daemon that the model has hidden from it."""
    replica = contained(stack)
    uid = int(replica["sandbox"].removeprefix("user ").partition(",")[0])
    before = model_users.processes_of(uid)
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in before]
    assert any(b"sleep\x003600" in command for command in commands), commands
    stack.worker("hostile-v1").kill()
    end = time.monotonic() + PATIENCE_S
    while left := [pid for pid in before if pid in model_users.processes_of(uid)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)
