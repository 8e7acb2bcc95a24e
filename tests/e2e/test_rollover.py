"""A next version takes over without a gap; a broken one hurts nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO, Stack
from tidegate import Client

IDENTITY = "examples/python-model/identity"


def variant(folder: Path, factor: int) -> Path:
    """An identity model that multiplies; another artifact for another version."""
    folder.mkdir(exist_ok=True)
    source = f"""
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        x = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", value * {factor})]) for value in x]
"""
    path = folder / "model.py"
    path.write_text(source)
    return path


def test_no_gap_and_both_versions_answer(stack: Stack, client: Client, tmp_path: Path):
    signature = ["--signature", f"{IDENTITY}/signature.json"]
    stack.deploy(variant(tmp_path, 1), "roll", *signature)
    stop, problems, seen = threading.Event(), [], []

    def flow() -> None:
        with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as mine:
            while not stop.is_set():
                try:
                    seen.append(float(mine.infer("roll", {"x": np.ones((1, 16), np.float32)})["y"][0, 0]))
                except Exception as error:  # any of them is a gap
                    problems.append(repr(error))

    thread = threading.Thread(target=flow)
    thread.start()
    try:
        stack.deploy(variant(tmp_path, 2), "roll", *signature)
        end = time.monotonic() + PATIENCE_S
        while not (seen and seen[-1] == 2.0):
            assert time.monotonic() < end, "the new version never took over"
            time.sleep(0.05)
    finally:
        stop.set()
        thread.join()
    assert not problems, problems[:3]
    assert seen == sorted(seen), "one version, then the other"
    # The old version drains to nothing after a while, and still wakes for those who ask for it by number.
    one = np.ones((1, 16), np.float32)
    assert client.infer("roll", {"x": one}, version="1", timeout_s=60)["y"][0, 0] == 1.0
    assert client.infer("roll", {"x": one}, version="2")["y"][0, 0] == 2.0


def test_a_version_that_cannot_load(
    stack: Stack, client: Client, deploy_python: Callable[..., str], tmp_path: Path
):
    deploy_python("identity", "sturdy")
    broken = tmp_path / "model.py"
    broken.write_text(
        "class TritonPythonModel:\n"
        "    def initialize(self, args):\n"
        "        raise ValueError('the weights are missing')\n"
    )
    signature = str(REPO / "examples" / "python-model" / "identity" / "signature.json")
    done = stack.run(
        *("deploy", str(broken), "--name", "sturdy", "--signature", signature, "--wait", "--timeout", "150")
    )
    assert done.returncode == 4, done.stdout + done.stderr
    assert "the weights are missing" in done.stdout + done.stderr
    x = np.full((1, 16), 7, np.float32)
    answer = client.infer("sturdy", {"x": x})
    assert answer.model_version == "1"
    assert np.array_equal(answer["y"], x)
