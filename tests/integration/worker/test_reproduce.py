"""``services.worker.reproduce`` contains the model of a dead letter as a replica does."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.integration.worker.contained import ROOT
from tidegate.kernel.protocol.envelope import Buffer, call_key, request_frame, tensor
from tidegate.kernel.protocol.models import Assignment, Deployment, Signature, TensorSpec, Version
from tidegate.kernel.protocol.tensors import pack_strings

pytestmark = pytest.mark.integration

MODEL = """
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        path = pb_utils.get_input_tensor_by_name(request, "path").as_numpy().ravel()[0].decode()
        try:
            said = Path(path).read_text()
        except OSError as error:
            said = "refused: " + type(error).__name__
        return pb_utils.InferenceResponse([pb_utils.Tensor("said", np.array([[said]], object))])
"""
SIGNATURE = Signature(
    inputs=[TensorSpec(name="path", datatype="BYTES", shape=[1])],
    outputs=[TensorSpec(name="said", datatype="BYTES", shape=[1])],
    max_batch_size=1,
)


def assignment(sha256: str, size: int) -> Assignment:
    now = datetime.now(UTC)
    version = Version(
        model="thief", number=1, format="python", artifact_sha256=sha256, artifact_size=size,
        filename="model.py", signature=SIGNATURE, created_at=now,
    )  # fmt: skip
    deployment = Deployment(name="thief-v1", model="thief", version=1, revision=1, created_at=now)
    return Assignment(
        replica="reproduce-1", generation=0, deployment=deployment, version=version, launched_at=0.0
    )


def test_the_model_is_contained_as_in_a_replica(open_folder: Path, runtime: Path):
    state = open_folder / "state"
    folder, cache = state / "reproduce" / "1", state / "cache"
    folder.mkdir(parents=True)
    cache.mkdir()
    (state / "token").write_text("the service token")
    sha256 = hashlib.sha256(MODEL.encode()).hexdigest()
    (cache / sha256).write_text(MODEL)
    (folder / "assignment.json").write_text(assignment(sha256, len(MODEL)).model_dump_json())
    key = call_key((tensor("path", "BYTES", (1,)),), (), {})
    data: list[Buffer] = [pack_strings([str(state / "token")])]
    (folder / "payload").write_bytes(request_frame(os.urandom(16), 1, 1, key, data, flags=1))
    done = subprocess.run(
        [sys.executable, "-m", "services.worker.reproduce", "--replica-dir", folder,
         "--payload", folder / "payload"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "TIDEGATE_STATE_DIR": str(state), "TIDEGATE_RUNTIME_DIR": str(runtime)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if "cannot be contained" in done.stderr or "none:" in done.stderr:
        pytest.skip("nothing can be contained on this machine")
    assert "refused: " in done.stdout, done.stdout + done.stderr
    assert "the service token" not in done.stdout
