"""Models of other systems, brought by `tidegate import`, answer their own clients."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.conftest import Stack
from tidegate import Client
from tidegate.kernel.settings.base import Settings

pytestmark = pytest.mark.e2e

TRAIN = """
import pickle, sys, joblib, numpy as np
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
x, y = load_iris(return_X_y=True)
model = LogisticRegression(max_iter=500).fit(x, y)
joblib.dump(model, sys.argv[1] + "/model.joblib")
pickle.dump(model, open(sys.argv[1] + "/model.pkl", "wb"))
np.savez(sys.argv[1] + "/held.npz", x=x[::7], label=model.predict(x[::7]), scores=model.predict_proba(x[::7]))
"""
MLMODEL = """
flavors:
  python_function: {loader_module: mlflow.sklearn, model_path: model.pkl, predict_fn: predict}
  sklearn: {pickled_model: model.pkl, serialization_format: pickle, sklearn_version: 1.9.1}
run_id: 4f1c
utc_time_created: '2026-11-29 21:00:00.123456'
signature:
  inputs: '[{"type": "tensor", "tensor-spec": {"dtype": "float64", "shape": [-1, 4]}}]'
  outputs: '[{"type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1]}}]'
"""
SCRIPT = """
import csv, io, json, os
import joblib, numpy as np

def model_fn(model_dir):
    return joblib.load(os.path.join(model_dir, "model.joblib"))

def input_fn(body, content_type):
    if content_type == "text/csv":
        return np.array([[float(cell) for cell in line] for line in csv.reader(io.StringIO(body))])
    return np.array(json.loads(body)["flowers"])

def predict_fn(flowers, model):
    return model.predict_proba(flowers)

def output_fn(scores, accept):
    return json.dumps({"scores": scores.tolist()}), "application/json"
"""
HANDLER = """
import json
from pathlib import Path

class Words:
    def initialize(self, context):
        self.words = json.loads((Path(context.system_properties["model_dir"]) / "words.json").read_text())

    def handle(self, data, context):
        return [{"found": [word for word in self.words if word in row["body"]["text"]]} for row in data]
"""


def tar_of(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def iris(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an estimator as joblib and as pickle, and with what it says itself."""
    out = tmp_path_factory.mktemp("iris")
    python = Settings().runtime_path / "model-env" / "bin" / "python3"
    subprocess.run([python, "-c", TRAIN, str(out)], check=True, timeout=300)
    return out


@pytest.fixture(scope="module")
def flowers(iris: Path) -> Path:
    """An MLflow folder, as mlflow.sklearn writes it."""
    folder = iris / "flowers"
    folder.mkdir()
    (folder / "MLmodel").write_text(MLMODEL)
    (folder / "model.pkl").write_bytes((iris / "model.pkl").read_bytes())
    return folder


@pytest.fixture(scope="module")
def imported(stack: Stack, iris: Path, flowers: Path) -> Any:
    """Import a model of each system, which start together. Return the document of the MLflow model."""
    files = {"code/inference.py": SCRIPT.encode(), "model.joblib": (iris / "model.joblib").read_bytes()}
    words = iris / "words.mar"
    with zipfile.ZipFile(words, "w") as mar:
        manifest = {"model": {"modelName": "spotter", "handler": "words.py", "modelVersion": "1.0"}}
        mar.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        mar.writestr("words.py", HANDLER)
        mar.writestr("words.json", '["tide", "gate"]')
    found = stack.cli("import", "mlflow", str(flowers), "--allow-pickle", "--no-wait")
    stack.cli("import", "sagemaker", str(tar_of(iris / "scores.tar.gz", files)), "--no-wait")
    stack.cli("import", "torchserve", str(words))
    for each in ("flowers-v1", "scores-v1"):
        stack.worker(each)
    return found


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=120) as made:
        yield made


def test_a_pickle_needs_the_permission_and_a_dry_run_says_so(stack: Stack, flowers: Path) -> None:
    refused = stack.run("import", "mlflow", str(flowers), "--no-wait")
    assert refused.returncode == 2
    assert "--allow-pickle" in refused.stderr
    assert stack.cli("import", "mlflow", str(flowers), "--dry-run")["import"]["needs_allow_pickle"]


def test_an_mlflow_model(client: Client, imported: Any, iris: Path) -> None:
    assert imported["version"]["metadata"]["run"] == "4f1c"
    assert {"from": "flavour sklearn", "to": "format mlflow, file model.pkl"} in imported["import"]["mapped"]
    with np.load(iris / "held.npz") as held:
        assert client.infer("flowers", {"input": held["x"]})["output"].tolist() == held["label"].tolist()


def test_a_handler_of_torchserve_gets_the_body(http: httpx.Client, imported: Any) -> None:
    answer = http.post("/predictions/spotter", json={"text": "the tide comes in"})
    assert (answer.status_code, answer.json()) == (200, {"found": ["tide"]})
    assert answer.headers["content-type"] == "application/json"


def test_a_script_of_sagemaker_gets_the_body_and_its_type(
    http: httpx.Client, imported: Any, iris: Path
) -> None:
    with np.load(iris / "held.npz") as held:
        x, scores = held["x"], held["scores"]
    lines = "\n".join(",".join(map(str, row)) for row in x.tolist())
    for body, kind in ((json.dumps({"flowers": x.tolist()}), "application/json"), (lines, "text/csv")):
        answer = http.post("/endpoints/scores/invocations", content=body, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
        assert np.array_equal(np.array(answer.json()["scores"]), scores)


def test_boto3_calls_an_imported_script(
    stack: Stack, imported: Any, iris: Path, clients_python: Path
) -> None:
    with np.load(iris / "held.npz") as held:
        x, scores = held["x"], held["scores"]
    body = base64.b64encode(json.dumps({"flowers": x.tolist()}).encode()).decode()
    call = {"EndpointName": "scores", "ContentType": "application/json", "Body": body}
    given = {"url": stack.settings.gateway_url, "key": "EMPTY", "calls": [call]}
    script = Path(__file__).with_name("use_sagemaker.py")
    done = subprocess.run(
        [clients_python, script],
        input=json.dumps(given),
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    assert np.array_equal(np.array(json.loads(base64.b64decode(answer["Body"]))["scores"]), scores)
    assert answer["ContentType"] == "application/json"
