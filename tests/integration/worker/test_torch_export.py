"""Programs of torch.export and an archive of TorchServe in the real Triton, compared with torch.

See `make test-formats`.
"""

import json
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.registry.adapters import artifact_inspection, glimpses
from services.worker.adapters.triton_client import ModelInferRequest
from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import Figure, MadeOnce
from tests.integration.worker.other_tools import environments, only_for
from tests.integration.worker.test_mlflow import packed
from tidegate.cli.imports import torchserve
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

pytestmark = [pytest.mark.integration, only_for("torch")]

Run = Callable[..., Awaitable[Any]]
TORCH = ["torch==2.13.0", "pillow"]


@pytest.fixture(scope="session")
def saved(install: TritonInstall, made_once: MadeOnce) -> Path:
    """A folder with programs and an archive, and torch's answers."""
    python = environments(install).built(TORCH)
    script = Path(__file__).parent / "makers" / "torch_models.py"

    def make(out: Path) -> None:
        done = subprocess.run([python, script, out], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    return made_once("torch-models", make)


@pytest.mark.parametrize(("name", "max_batch"), [("open", 64), ("fixed", 0)])
async def test_a_program_answers_as_torch_does(
    run: Run, install: TritonInstall, saved: Path, figure: Figure, name: str, max_batch: int
) -> None:
    path = saved / f"{name}.pt2"
    kind = glimpses.kind_of(path, path.name, ArchiveLimits())
    assert kind is not None
    assert kind.format == "pt2"
    found = artifact_inspection.inspect(
        path, "pt2", model="m", user_signature=None, max_batch=64, limits=ArchiveLimits()
    )
    assert found.signature is not None
    assert found.signature.max_batch_size == max_batch
    layered = await environments(install).provide(TORCH)
    running = await run("pt2", path, found.signature, install=layered, start_timeout_s=300)
    with np.load(saved / "programs.npz") as file:
        arrays = dict(file)
    rows = [slice(0, 5)] if name == "fixed" else [slice(0, 1), slice(0, 5), slice(2, 4)]
    for part in rows:
        message = ModelInferRequest(model_name="m")
        for key in ("x", "scale"):
            message.inputs.add(name=key, datatype="FP32", shape=arrays[key][part].shape)
            message.raw_input_contents.append(arrays[key][part].tobytes())
        answer = await running.client.infer(message, 60)
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
            wanted = arrays[output.name][part]
            assert np.allclose(np.frombuffer(raw, "<f4").reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)
    figure(f"torch.export {name}.pt2: outputs y and size equal torch 2.13's")


@pytest.mark.parametrize(("name", "body"), [("pictures", None), ("boxes", None), ("words", b"Good film.")])
async def test_the_built_in_handlers_of_torchserve(
    run: Run, install: TritonInstall, saved: Path, tmp_path: Path, name: str, body: bytes | None
) -> None:
    plan = torchserve.plan_of(saved / f"{name}.mar", None, tmp_path / "work")
    assert "torch" in (plan.requirements or ())
    artifact = packed(plan.path, tmp_path / "m.tar.gz")
    found = artifact_inspection.inspect(
        artifact, "python", model="m", user_signature=None, max_batch=64, limits=ArchiveLimits()
    )
    layered = await environments(install).provide(TORCH)
    running = await run("python", artifact, found.signature, install=layered, start_timeout_s=300)
    message = ModelInferRequest(model_name="m")
    message.inputs.add(name="body", datatype="BYTES", shape=[1])
    message.raw_input_contents.append(pack_strings([body or (saved / "picture.png").read_bytes()]))
    answer = await running.client.infer(message, 60)
    raw = dict(zip((each.name for each in answer.outputs), answer.raw_output_contents, strict=True))
    assert rounded(json.loads(unpack_strings(raw["body"])[0])) == rounded(
        json.loads((saved / f"{name}.json").read_text())
    )


def rounded(value: Any) -> Any:
    """Return a document with its numbers rounded to six digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value
