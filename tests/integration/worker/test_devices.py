"""Where models run on the real Triton. Without a GPU, these tests show that no model falls back silently."""

import shutil
import subprocess
import zipfile
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from services.worker.adapters import model_device
from services.worker.adapters.model_repository import prepare
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_command import TritonOptions
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.triton_process import new_triton
from services.worker.adapters.warmup import zeros
from services.worker.application.model_loader import ModelLoader
from tests.integration.worker.test_triton_models import DIGITS
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import Deployment, Signature, Version
from tidegate.kernel.triton_protocol import pb

pytestmark = pytest.mark.integration

Run = Callable[..., Awaitable[Any]]
Example = Callable[[str], tuple[Path, Signature]]
RUNTIMES = Path(__file__).parents[3] / "services" / "worker" / "runtimes"
CONFIG = 'backend: "python" instance_group [ { kind: KIND_GPU } ]'


@pytest.fixture
def no_gpu() -> None:
    """Skip where there is a GPU: `make test-gpu` has the tests for that."""
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout:
        pytest.skip("this machine has a GPU, and this test is about one that has none")


async def test_a_model_without_gpus_runs_on_the_cpu_and_says_so(run: Run, models: Path) -> None:
    running = await run("onnx", models / "model.onnx", DIGITS, "digits")
    assert await model_device.read_device(running.client, ["digits"]) == "cpu"


@pytest.mark.usefixtures("no_gpu")
async def test_a_promised_gpu_that_is_not_there_is_no_cpu(run: Run, models: Path) -> None:
    """It used to be loaded on the CPU without a warning."""
    with pytest.raises(ModelFailed, match="gpu id 0"):
        await run("onnx", models / "model.onnx", DIGITS, "digits", resources={"gpus": 1})


async def test_a_users_gpu_that_the_replica_does_not_hold_is_refused(
    run: Run, example: Example, tmp_path: Path
) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/config.pbtxt", CONFIG)
        file.write(example("identity")[0], "m/1/model.py")
    with pytest.raises(ModelFailed, match=r"'m' requests a GPU .* this replica has none"):
        await run("triton", path, None)


def loading(
    install: TritonInstall, folder: Path, artifact: Path, **resources: object
) -> tuple[ModelLoader, Callable[[], Any]]:
    """Return functions that load digits as a worker does, and create its Triton."""
    born = datetime(2025, 1, 1, tzinfo=UTC)
    version = Version(
        model="digits", number=1, format="onnx", artifact_sha256="0" * 64, artifact_size=1,
        filename="model.onnx", signature=DIGITS, created_at=born,
    )  # fmt: skip
    fields = {"name": "digits-v1", "model": "digits", "version": 1, "revision": 1, "created_at": born}
    deployment = Deployment.model_validate({**fields, "resources": resources})
    folder.mkdir()
    process = new_triton(install, folder, TritonOptions("digits-v1-0-1", auto_complete=False))
    write = partial(prepare, version, deployment, artifact, process.repository, install)
    return ModelLoader(deployment, write), lambda: process


@pytest.mark.usefixtures("no_gpu")
async def test_a_deployment_may_allow_the_cpu_in_place_of_its_gpu(
    install: TritonInstall, models: Path, tmp_path: Path
) -> None:
    for allowed in (False, True):
        resources = {"gpus": 1, "allow_cpu": allowed}
        loads, made = loading(install, tmp_path / str(allowed), models / "model.onnx", **resources)
        process, names = made(), await loads.prepare()
        await process.start()
        client = TritonClient(process.target, process.http)
        try:
            if not allowed:
                with pytest.raises(ModelFailed, match=r"has 1 GPU.*nvidia-smi.*allow_cpu=1.*gpu id 0"):
                    await loads.load(client, names, process.tail)
                assert loads.device == ""
                continue
            await loads.load(client, names, process.tail)
            assert loads.device == "cpu"
            assert loads.caveat.startswith(
                "runs on the CPU (allow_cpu permits this), because the GPU failed: This"
            )
            assert await client.infer(zeros("digits", DIGITS, 1), 60)
            # As after a crash of Triton: it is not tried on the GPU again.
            await loads.load(client, names, process.tail)
        finally:
            await client.close()
            await process.stop(grace_s=0)


async def test_a_deployments_environment_cannot_choose_other_gpus(
    run: Run, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    greedy = {"CUDA_VISIBLE_DEVICES": "0,1", "NVIDIA_VISIBLE_DEVICES": "all", "MINE": "1"}
    running = await run("python", *example("identity"), "identity", env=greedy)
    environ = Path(f"/proc/{running.process.pid}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=" in environ
    assert b"NVIDIA_VISIBLE_DEVICES=all" not in environ
    assert b"MINE=1" in environ


ON_GPU = """
import sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/" + sys.argv[2]]
import json, model
config = {"input": [], "output": [], "max_batch_size": 0, "parameters": {}}
model.TritonPythonModel().initialize({
    "model_config": json.dumps(config), "model_repository": sys.argv[3], "model_version": "1",
    "model_instance_kind": "GPU", "model_instance_device_id": "0",
})
"""


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("library", "module", "file", "remedy"),
    [
        ("onnx", "onnxruntime", "model.onnx", "onnxruntime-gpu[cuda,cudnn]"),
        ("torchscript", "torch", "model.pt", "`make torch`"),
    ],
)
def test_our_runtimes_refuse_a_gpu_that_their_library_cannot_use(
    install: TritonInstall, models: Path, tmp_path: Path, library: str, module: str, file: str, remedy: str
) -> None:
    """Use the real library, as Triton starts the runtime on a GPU."""
    if not install.has_module(module):
        pytest.skip(f"{module} is not in the models' environment: `make torch` puts it there")
    version = tmp_path / "1"
    version.mkdir()
    shutil.copy(models / "model.onnx", version / file)
    command = list(map(str, (install.python, "-c", ON_GPU, RUNTIMES, library, tmp_path)))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"RuntimeError: This replica has a GPU, but {module} "), done.stderr
    assert "cannot use it: this build is for the CPU only" in last
    assert remedy in last
    assert "allow_cpu=1" in last


class Told:
    """A fake client with a model on two GPUs, because the tests' machines have none."""

    async def config(self, model: str) -> Any:
        found = pb.ModelConfigResponse().config
        if model == "ensemble":
            found.ensemble_scheduling.step.add(model_name="net")
        else:
            found.instance_group.add(count=2, kind=1, gpus=[0, 1])
        return found


async def test_the_names_of_gpus_come_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client: Any = Told()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-a")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await model_device.read_device(client, ["net", "ensemble"]) == "cuda:0, cuda:1", (
        "without nvidia-smi"
    )
    smi = tmp_path / "nvidia-smi"
    asked = "--query-gpu=uuid,name --format=csv,noheader"
    listing = "GPU-a, Tesla T4\\nGPU-b, NVIDIA H100 80GB HBM3\\n"
    smi.write_text(f'#!/bin/sh\n[ "$*" = "{asked}" ] || exit 9\nprintf "{listing}"\n')
    smi.chmod(0o755)
    said = await model_device.read_device(client, ["net", "ensemble"])
    assert said == "cuda:0 (NVIDIA H100 80GB HBM3), cuda:1 (Tesla T4)"
