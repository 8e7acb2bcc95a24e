"""From `deploy --resource gpus=1` to what status says, on a host whose only GPU is a made up `nvidia-smi`.

So everything is real but the device: Triton finds none, and the replica must not go on without a word.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Digits, Stack, running_stack
from tidegate import Client

LISTING = "GPU-0a1b, 16384, Tesla T4\\n"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own, whose hosts' `nvidia-smi` lists one GPU."""
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout:
        pytest.skip("this machine has a GPU: `make test-gpu` tests that")
    folder = tmp_path_factory.mktemp("gpus")
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f'#!/bin/sh\nprintf "{LISTING}"\n')
    smi.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(smi.parent), prepend=":")
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with running_stack(folder / "state") as found:
            yield found


def failed_start(stack: Stack, deployment: str) -> dict[str, Any]:
    """Wait for a start to fail and return the condition that says why."""
    for _ in range(2400):
        for status in stack.autoscaler("/v1/deployments")["items"]:
            for condition in status["conditions"] if status["deployment"] == deployment else ():
                if condition["type"] == "Loaded" and not condition["ok"]:
                    found: dict[str, Any] = condition
                    return found
        time.sleep(0.1)
    raise AssertionError(f"no start of {deployment} failed")


def placed(stack: Stack, deployment: str) -> tuple[dict[str, Any], list[str]]:
    """Return the only replica once it says where its model runs, and what status says of the Deployment."""
    for _ in range(2400):
        status = next(
            d for d in stack.autoscaler("/v1/deployments")["items"] if d["deployment"] == deployment
        )
        found: list[dict[str, Any]] = status["replicas"]
        if len(found) == 1 and found[0]["state"] == "ready" and found[0]["device"]:
            return found[0], status["devices"]
        time.sleep(0.1)
    raise AssertionError(f"the replica of {deployment} does not say where it runs")


def deleted(stack: Stack, name: str) -> None:
    """Delete a model and wait until its replicas hold no GPU any more."""
    stack.cli("delete", name, "--yes")
    for _ in range(2400):
        if not stack.replicas(f"{name}-v1"):
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} is still there")


def test_a_gpu_that_nothing_can_use_fails_the_start_and_says_what_to_do(stack: Stack, digits: Digits):
    stack.run("deploy", str(digits.model), "--name", "wants", "--resource", "gpus=1", "--no-wait")
    failed = failed_start(stack, "wants-v1")
    assert failed["reason"] == "LoadFailed"
    assert "This replica has 1 GPU(s), but its Triton cannot find or use all of them" in failed["message"]
    assert "allow_cpu=1" in failed["message"]
    deleted(stack, "wants")


def test_more_gpus_than_the_host_has_are_explained_by_why(stack: Stack, digits: Digits):
    stack.run("deploy", str(digits.model), "--name", "greedy", "--resource", "gpus=2", "--no-wait")
    failed = failed_start(stack, "greedy-v1")
    assert failed["reason"] == "LaunchFailed"
    (held,) = [text for text in stack.cli("why", "greedy")["holds"] if "failed start" in text]
    assert "needs 2 whole GPUs; GPU-0a1b has" in held
    deleted(stack, "greedy")


def test_allow_cpu_serves_and_status_says_where(stack: Stack, client: Client, digits: Digits):
    stack.deploy(digits.model, "lenient", "--resource", "gpu_memory_mb=100", "--resource", "allow_cpu=1")
    replica, devices = placed(stack, "lenient-v1")
    assert devices == ["cpu"]
    assert replica["gpus"] == ["GPU-0a1b"], "the lease"
    assert replica["device"] == "cpu", "the truth"
    assert replica["message"].startswith("runs on the CPU (allow_cpu permits this), because the GPU failed")
    assert (client.infer("lenient", {"image": digits.images[:9]})["label"] == digits.labels[:9]).all()
    for command in ("status", "replicas"):
        assert "RUNS ON" in stack.run(command).stdout


def test_a_model_without_gpus_sees_none(stack: Stack, digits: Digits):
    stack.deploy(digits.model, "plain")
    replica, _ = placed(stack, "plain-v1")
    assert replica["device"] == "cpu"
    assert "gpus" not in replica
    environ = Path(f"/proc/{replica['pid']}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=" in environ
