"""Models on a real GPU, from `deploy --resource gpus=1` to status: `make test-gpu` runs this file alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Figure
from tests.e2e.conftest import Digits, Stack
from tests.e2e.test_gpus import deleted, placed
from tests.integration.worker.test_torchscript import MAKE
from tidegate import Client
from tidegate.kernel.settings.base import Settings

pytestmark = pytest.mark.gpu

HAS_CUDA = {
    "onnxruntime": "import onnxruntime as o; ok = 'CUDAExecutionProvider' in o.get_available_providers()",
    "torch": "import torch; ok = torch.cuda.is_available()",
}
REMEDY = {"onnxruntime": "make onnx-gpu", "torch": "make torch"}
# A context of CUDA takes several times this.
CONTEXT_MIB = 50
NET = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [8]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [4]}],
    "max_batch_size": 32,
}


# Of the session, so that it comes before the stack, which would be started for nothing.
@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    """Return the name of this machine's GPUs (the first one's); skip where there is none, with the reason."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no GPU here: there is no nvidia-smi")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode != 0 or not done.stdout.strip():
        pytest.skip(f"no GPU here: nvidia-smi says {(done.stdout + done.stderr).strip()[-200:]!r}")
    return done.stdout.splitlines()[0].strip()


def needs(library: str) -> str:
    """Return the models' Python; skip where its library has no CUDA."""
    python = str(Settings().runtime_path / "model-env" / "bin" / "python3")
    check = f"{HAS_CUDA[library]}; raise SystemExit(not ok)"
    if subprocess.run([python, "-c", check], capture_output=True).returncode != 0:
        pytest.skip(f"the models' {library} cannot use CUDA: `{REMEDY[library]}`")
    return python


def used_mib() -> dict[str, int]:
    """Return what is used of each GPU's memory, by its UUID."""
    query = ["nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    rows = (line.split(", ") for line in listing.splitlines())
    return {uuid: int(used) for uuid, used in rows}


def on_the_gpu(stack: Stack, deployment: str, gpu: str, before: dict[str, int]) -> None:
    """Assert that the replica and the status say so, and that the GPU's memory agrees."""
    replica, devices = placed(stack, deployment)
    assert replica["device"] == f"cuda:0 ({gpu})"
    assert devices == [f"cuda:0 ({gpu})"]
    (held,) = replica["gpus"]
    assert f"cuda:0 ({gpu})" in stack.run("status").stdout
    assert used_mib()[held] > before[held] + CONTEXT_MIB, "a process computes on the GPU that it holds"


def test_digits_on_cuda(stack: Stack, client: Client, digits: Digits, gpu: str, figure: Figure):
    needs("onnxruntime")
    before = used_mib()
    stack.deploy(digits.model, "digits-gpu", "--resource", "gpus=1")
    on_the_gpu(stack, "digits-gpu-v1", gpu, before)
    answer = client.infer("digits-gpu", {"image": digits.images[:60]})
    assert (answer["label"] == digits.labels[:60]).all()
    # A GPU adds up in another order.
    off = np.abs(answer["probabilities"] - digits.probabilities[:60]).max()
    assert off < 1e-3
    figure(f"digits by onnxruntime on {gpu}: labels equal, probabilities within {off:.1e}")
    deleted(stack, "digits-gpu")


def test_torchscript_on_cuda(stack: Stack, client: Client, gpu: str, tmp_path: Path, figure: Figure):
    python = needs("torch")
    (tmp_path / "make.py").write_text(MAKE)
    subprocess.run([python, tmp_path / "make.py", tmp_path], check=True)
    (tmp_path / "signature.json").write_text(json.dumps(NET))
    signature = ("--signature", str(tmp_path / "signature.json"))
    before = used_mib()
    stack.deploy(tmp_path / "net.pt", "net-gpu", *signature, "--resource", "gpus=1")
    on_the_gpu(stack, "net-gpu-v1", gpu, before)
    with np.load(tmp_path / "expected.npz") as expected:
        off = np.abs(client.infer("net-gpu", {"x": expected["x"]})["y"] - expected["y"]).max()
    assert off < 1e-3
    figure(f"TorchScript on {gpu}: answers within {off:.1e} of torch on the CPU")
    deleted(stack, "net-gpu")


def test_a_replica_without_gpus_stays_on_the_cpu(stack: Stack, digits: Digits):
    """Although the machine has one."""
    stack.deploy(digits.model, "digits-cpu")
    replica, _ = placed(stack, "digits-cpu-v1")
    assert replica["device"] == "cpu"
    deleted(stack, "digits-cpu")
