"""Fixtures with the real Triton, and with models made by the models' Python."""

import json
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.worker.adapters.model_repository import cache_mb, prepare
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_command import TritonOptions
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.triton_process import TritonProcess, new_triton, repository_in
from services.worker.domain.devices import replica_gpus
from services.worker.domain.formats import config_is_complete
from tests.conftest import MadeOnce
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import DeploymentSpec, Format, Signature, Version

ROOT = Path(__file__).parents[3]

# What users bring besides the digits: a classifier in a joblib, and an export that forgot zipmap=False.
OTHER_MODELS = """
import sys, joblib, numpy as np
from skl2onnx import to_onnx
from sklearn.linear_model import LogisticRegression
x = np.random.default_rng(1).normal(size=(80, 4))
model = LogisticRegression().fit(x, np.where(x[:, 0] + x[:, 1] > 0, "up", "down"))
joblib.dump(model, sys.argv[1] + "/model.joblib")
label, probabilities = model.predict(x).astype("S"), model.predict_proba(x)
np.savez(sys.argv[1] + "/classifier.npz", x=x, label=label, probabilities=probabilities)
open(sys.argv[1] + "/zipmap.onnx", "wb").write(to_onnx(model, x[:1].astype(np.float32)).SerializeToString())
"""


@dataclass
class Running:
    """A running Triton with a loaded model."""

    process: TritonProcess
    client: TritonClient
    model: str


Run = Callable[..., Awaitable[Running]]


@pytest.fixture(scope="session")
def runtime() -> Path:
    return Path(os.environ.get("TIDEGATE_RUNTIME_DIR") or ROOT / ".tidegate" / "runtime").absolute()


@pytest.fixture(scope="session")
def install(runtime: Path) -> TritonInstall:
    return TritonInstall.find(runtime)


@pytest.fixture(scope="session")
def models(runtime: Path, made_once: MadeOnce) -> Path:
    """A folder with the digits example, ``model.joblib`` and ``zipmap.onnx``."""
    python = runtime / "model-env" / "bin" / "python3"

    def make(folder: Path) -> None:
        subprocess.run([python, ROOT / "examples/digits/train.py", "--out", folder], check=True, timeout=120)
        subprocess.run([python, "-c", OTHER_MODELS, folder], check=True, timeout=120)

    return made_once("models", make)


@pytest.fixture(scope="session")
def example() -> Callable[[str], tuple[Path, Signature]]:
    """Return the file and the signature of one of the example's Python models."""

    def find(name: str) -> tuple[Path, Signature]:
        folder = ROOT / "examples" / "python-model" / name
        return folder / "model.py", Signature.model_validate(
            json.loads((folder / "signature.json").read_text())
        )

    return find


@pytest.fixture
async def run(install: TritonInstall, tmp_path: Path) -> AsyncIterator[Run]:
    """Start Triton with a model, as a worker does. All Tritons stop at the end of the test."""
    started: list[tuple[TritonProcess, TritonClient]] = []

    async def go(
        artifact_format: Format,
        artifact: Path,
        signature: Signature | None,
        name: str = "m",
        install: TritonInstall = install,
        **settings: object,
    ) -> Running:
        version = Version(
            model=name, number=1, format=artifact_format, artifact_sha256="0" * 64, artifact_size=1,
            filename=artifact.name, signature=signature, created_at=datetime.now(UTC),
        )  # fmt: skip
        spec = DeploymentSpec.model_validate({"name": f"{name}-v1", "model": name, "version": 1, **settings})
        folder = tmp_path / f"replica-{len(started)}"
        repository = repository_in(folder)
        models = prepare(version, spec, artifact, repository, install, replica_gpus(spec.resources))
        options = TritonOptions(
            replica=f"{name}-v1-0-{len(started)}",
            env=spec.env,
            auto_complete=not config_is_complete(version),
            start_timeout_s=spec.start_timeout_s,
            response_cache_mb=cache_mb(repository, models, spec, install),
        )
        folder.mkdir(exist_ok=True)
        process = new_triton(install, folder, options)
        await process.start()
        client = TritonClient(process.target, process.http)
        started.append((process, client))
        for model in models:
            try:
                await client.load(model, spec.start_timeout_s)
            except ModelFailed as failure:
                raise ModelFailed(f"{failure.message}\n{process.tail()}") from None
        return Running(process, client, model)

    yield go
    for process, client in started:
        await client.close()
        await process.stop(grace_s=0)
