"""MLflow folders in the real Triton, compared with the answers of MLflow's own python_function."""

import contextlib
import json
import os
import signal
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.registry.adapters import artifact_inspection
from services.registry.adapters.artifact_inspection import Inspection
from services.worker.adapters.triton_client import ModelInferRequest, TritonClient
from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import PATIENCE_S, MadeOnce
from tests.integration.worker.other_tools import environments, only_for
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.imports import mlflow
from tidegate.cli.imports.mlflow_server import TrackingServer
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Signature, VersionMetadata
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration

Run = Callable[..., Awaitable[Any]]
MAKERS = [
    "mlflow==3.17.2", "pandas<3", "xgboost-cpu==3.2.0", "lightgbm==4.7.0", "skops==0.16.0",
    "torch==2.13.0",
]  # fmt: skip
"""What saves the models. It is installed above the models' own environment, so versions are the same."""

# As mlflow.sklearn writes it. The file is saved by joblib of the models' Python.
BY_HAND = """
flavors:
  python_function: {loader_module: mlflow.sklearn, model_path: model.pkl, predict_fn: predict}
  sklearn: {pickled_model: model.pkl, serialization_format: pickle}
signature:
  inputs: '[{"type": "tensor", "tensor-spec": {"dtype": "float64", "shape": [-1, 4]}}]'
  outputs: '[{"type": "tensor", "tensor-spec": {"dtype": "object", "shape": [-1]}}]'
"""


def packed(folder: Path, into: Path) -> Path:
    with tarfile.open(into, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
    return into


def looked_at(path: Path) -> Inspection:
    return artifact_inspection.inspect(
        path,
        "mlflow",
        model="m",
        user_signature=None,
        max_batch=64,
        limits=ArchiveLimits(),
        allow_pickle=True,
    )


async def answers(client: TritonClient, signature: Signature, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs for columns or arrays with the rows first."""
    message = ModelInferRequest(model_name="m")
    for spec in signature.inputs:
        array = np.asarray(inputs[spec.name])
        message.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        if spec.datatype == "BYTES":
            message.raw_input_contents.append(pack_strings([str(each) for each in array.ravel()]))
        else:
            message.raw_input_contents.append(array.astype(DATATYPES[spec.datatype].numpy).tobytes())
    answer = await client.infer(message, 30)
    found = {}
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            found[output.name] = np.array([each.decode() for each in unpack_strings(raw)])
        else:
            numbers = np.frombuffer(raw, DATATYPES[output.datatype].numpy)
            found[output.name] = numbers.reshape(output.shape)
    return found


async def test_an_estimator_saved_by_hand(run: Run, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "MLmodel").write_text(BY_HAND)
    (folder / "model.pkl").write_bytes((models / "model.joblib").read_bytes())
    artifact = packed(folder, tmp_path / "m.tar.gz")
    found = looked_at(artifact)
    assert found.requirements == []
    assert found.signature is not None
    running = await run("mlflow", artifact, found.signature)
    with np.load(models / "classifier.npz") as file:
        x, label = file["x"], file["label"]
    answer = await answers(running.client, found.signature, {"input": x})
    assert answer["output"].tolist() == label.astype(str).tolist()


@pytest.fixture(scope="session")
def saved(install: TritonInstall, made_once: MadeOnce) -> Path:
    """A folder with one MLflow model of each flavour, and MLflow's answers."""
    python = environments(install).built(MAKERS)
    script = Path(__file__).parent / "makers" / "mlflow_models.py"

    def make(out: Path) -> None:
        done = subprocess.run([python, script, out], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    return made_once("mlflow", make)


@only_for("mlflow")
@pytest.mark.parametrize(
    "name",
    ["sklearn_table", "sklearn_skops", "xgboost", "lightgbm", "onnx", "pyfunc", "pytorch", "pytorch_pt2"],
)
async def test_each_flavour_answers_as_mlflow_does(
    run: Run, install: TritonInstall, saved: Path, tmp_path: Path, name: str
) -> None:
    artifact = packed(saved / name, tmp_path / "m.tar.gz")
    found = looked_at(artifact)
    assert found.signature is not None
    layered = await environments(install).provide(found.requirements)
    running = await run("mlflow", artifact, found.signature, install=layered)
    with np.load(saved / f"{name}.npz") as file:
        inputs = {key[3:]: file[key] for key in file.files if key.startswith("in_")}
        expected = {key[4:]: file[key] for key in file.files if key.startswith("out_")}
    answer = await answers(running.client, found.signature, inputs)
    assert answer.keys() == expected.keys()
    for key, values in expected.items():
        if values.dtype.kind == "U":
            assert answer[key].tolist() == values.ravel().tolist()
        else:
            assert np.allclose(answer[key].reshape(values.shape), values, rtol=1e-6, atol=1e-6), (name, key)


@pytest.fixture(scope="session")
def tracking(install: TritonInstall, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real tracking server, which serves the files of models."""
    python, home = environments(install).built(MAKERS), tmp_path_factory.mktemp("tracking")
    (port,) = free_ports(1)
    command = [
        str(python), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "files"),
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=home, start_new_session=True)
    try:
        end = time.monotonic() + PATIENCE_S
        while True:
            assert server.poll() is None, (home / "log").read_text()[-2000:]
            assert time.monotonic() < end, (home / "log").read_text()[-2000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@only_for("mlflow")
def test_a_model_of_a_tracking_server_comes_with_its_run(
    install: TritonInstall, tracking: str, tmp_path: Path
) -> None:
    python = environments(install).built(MAKERS)
    script = Path(__file__).parent / "makers" / "mlflow_run.py"
    done = subprocess.run([python, script, tracking], capture_output=True, text=True, check=True)
    ids = json.loads(done.stdout.splitlines()[-1])
    server = TrackingServer(tracking, {})
    sources = [
        "models:/churn/1",
        "models:/churn/latest",
        "models:/churn@champion",
        f"runs:/{ids['run']}/model",
    ]
    for at, source in enumerate([*sources, f"models:/{ids['model']}"]):
        folder = tmp_path / str(at)
        facts = server.download(source, folder)
        plan = mlflow.plan_of(folder, None, source, facts, signed=False)
        metadata = VersionMetadata.model_validate(plan.metadata)
        assert metadata.run == ids["run"]
        assert metadata.metrics == {"accuracy": 0.93}
        assert metadata.parameters == {"C": "1.0", "solver": "lbfgs"}
        assert metadata.tags["team"] == "risk"
        assert metadata.framework == "sklearn"
        assert plan.name == ("churn" if "churn" in source else "model")
        assert (folder / "model.pkl").stat().st_size > 100
    assert plan.pickled
    with pytest.raises(UsageError, match=r"answers 404.*churn"):
        server.download("models:/churn/7", tmp_path / "none")
    with pytest.raises(UsageError, match="does not answer"):
        TrackingServer("http://127.0.0.1:1", {}).download("models:/churn/1", tmp_path / "none")
