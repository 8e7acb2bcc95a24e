"""Models as users bring them, from the command line to the answer."""

from __future__ import annotations

import json
import subprocess
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack
from tidegate import Client
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.settings.base import Settings

ENSEMBLES = Path(__file__).parents[2] / "examples" / "ensemble"
PLAIN = Path(__file__).parents[2] / "examples" / "python"
XY = (
    'backend: "python" max_batch_size: 8\n'
    'input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]\n'
    'output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]\n'
)
TEXTS = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}],
    "outputs": [{"name": "said", "datatype": "BYTES", "shape": [1]}],
    "max_batch_size": 1,
}
SAYS = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils
{imports}


class TritonPythonModel:
    def execute(self, requests):
        said = np.array([[json.dumps({what})]], dtype=object)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("said", said)]) for _ in requests]
"""
PIPELINE = """
import sys, joblib, numpy as np
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
x, y = load_iris(return_X_y=True)
model = make_pipeline(StandardScaler(), LogisticRegression()).fit(x[::2], y[::2])
joblib.dump(model, sys.argv[1] + "/iris.joblib")
x = x[1::2]
np.savez(sys.argv[1] + "/held.npz", x=x, label=model.predict(x), probabilities=model.predict_proba(x))
"""


def wheel(folder: Path, name: str, version: str, source: str) -> None:
    """A wheel with one module, written by hand: it needs no build tool and no index."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", source)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def said(client: Client, model: str, **how: Any) -> Any:
    answer = client.infer(model, {"x": np.zeros((1, 1), np.float32)}, **how)
    return json.loads(answer["said"].ravel()[0])


def column(*values: float) -> Any:
    return np.array(values, np.float32).reshape(-1, 1)


@pytest.fixture
def only_local(open_folder: Path) -> list[str]:
    """Options by which pip finds one package, in a folder, and nothing else."""
    wheel(open_folder / "wheels", "tidepool", "1.5", "DEPTH = 3\n")
    return ["--env", "PIP_NO_INDEX=1", "--env", f"PIP_FIND_LINKS={open_folder / 'wheels'}"]


def test_a_folder_with_code_and_requirements(
    stack: Stack, client: Client, only_local: list[str], tmp_path: Path
):
    imports = "import numpy, onnxruntime, tidepool\nfrom own import OWN"
    what = "[tidepool.DEPTH, OWN, numpy.__version__, tidepool.__file__]"
    folder = written(
        tmp_path / "mine",
        {
            "model.py": SAYS.format(imports=imports, what=what),
            "own.py": "OWN = 'a module of its own'\n",
            "requirements.txt": "# what it needs\ntidepool >= 1  # from the folder of wheels\n",
            "signature.json": json.dumps(TEXTS),
        },
    )
    signature = ["--signature", str(folder / "signature.json")]
    stack.deploy(folder, "needy", *signature, *only_local)
    depth, own, numpy_version, file = said(client, "needy")
    assert (depth, own) == (3, "a module of its own")
    assert numpy_version.startswith("1.")
    assert str(stack.settings.state_path / "cache" / "envs") in file
    (version,) = stack.cli("versions", "needy")["items"]
    assert version["requirements"] == ["tidepool >= 1"]
    (started,) = stack.cli("cold-starts", "needy-v1")["items"]
    assert started["phases_ms"]["environment"] > 0

    # The same needs are met by the same environment; other needs are another version of the same file.
    only = tmp_path / "model.py"
    only.write_text((folder / "model.py").read_text().replace("from own import OWN", "OWN = 'no'"))
    needs = tmp_path / "needs.txt"
    needs.write_text("tidepool >= 1\n")
    options = ["--requirements", str(needs), *signature, *only_local]
    stack.deploy(only, "needy-too", *options)
    assert said(client, "needy-too")[3] == file
    needs.write_text("tidepool == 1.5\n")
    stack.deploy(only, "needy-too", *options)
    assert [v["number"] for v in stack.cli("versions", "needy-too")["items"]] == [1, 2]
    assert said(client, "needy-too", version="2")[3] != file


def test_requirements_that_cannot_be_met(stack: Stack, only_local: list[str], tmp_path: Path):
    folder = written(
        tmp_path / "m",
        {"model.py": SAYS.format(imports="", what="1"), "requirements.txt": "tidepool == 99\n"},
    )
    signature = [
        "--signature",
        str(written(tmp_path, {"signature.json": json.dumps(TEXTS)}) / "signature.json"),
    ]
    done = stack.run("deploy", str(folder), "--name", "hopeless", "--timeout", "150", *signature, *only_local)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "No matching distribution found for tidepool==99" in done.stdout + done.stderr
    (folder / "requirements.txt").write_text("-r ../more.txt\n")
    done = stack.run("deploy", str(folder), "--name", "hopeless", *signature)
    assert done.returncode != 0
    assert "the option '-r' does not work" in done.stdout + done.stderr
    stack.cli("delete", "hopeless", "--yes")


def test_the_environment_of_the_model(stack: Stack, client: Client, tmp_path: Path):
    folder = written(
        tmp_path / "m",
        {
            "model.py": SAYS.format(imports="import os", what="dict(os.environ)"),
            "signature.json": json.dumps(TEXTS),
        },
    )
    options = [
        "--signature",
        str(folder / "signature.json"),
        "--env",
        "MINE=yes",
        "--env",
        "OMP_NUM_THREADS=3",
    ]
    stack.deploy(folder / "model.py", "environ", *options, "--threads", "2")
    found = said(client, "environ")
    assert found["MINE"] == "yes"
    assert (found["OMP_NUM_THREADS"], found["OPENBLAS_NUM_THREADS"]) == ("3", "2")
    assert [name for name in found if name.startswith("TIDEGATE_")] == ["TIDEGATE_REPLICA"]
    text = json.dumps(found)
    assert stack.settings.service_token not in text
    assert "amqp://" not in text
    assert "redis://" not in text
    (before,) = stack.replicas("environ-v1")
    stack.deploy(folder / "model.py", "environ", *options[:2], "--env", "MINE=again", "--threads", "2")
    ready = {r["replica"] for r in stack.replicas("environ-v1") if r["state"] == "ready"}
    assert ready, "the deploy waits for a replica with the new options"
    assert before["replica"] not in ready


def test_the_users_own_configuration(stack: Stack, client: Client, tmp_path: Path):
    model = """
import json, os, pathlib
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.factor = float(config["parameters"]["factor"]["string_value"]) * int(args["model_version"])
        self.offset = float((pathlib.Path(__file__).parent / "data" / "offset.txt").read_text())

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            bias = pb_utils.get_input_tensor_by_name(request, "bias")
            y = x * np.float32(self.factor) + np.float32(self.offset)
            y = pb_utils.Tensor("y", y if bias is None else y + bias.as_numpy())
            n = pb_utils.Tensor("n", np.full((len(x), 1), len(requests), np.int64))
            answers.append(pb_utils.InferenceResponse([y, n]))
        return answers
"""
    own = (
        'input [ { name: "bias" data_type: TYPE_FP32 dims: [ 1 ] optional: true } ]\n'
        'output [ { name: "n" data_type: TYPE_INT64 dims: [ 1 ] } ]\n'
        "instance_group [ { count: 2 } ] dynamic_batching { max_queue_delay_microseconds: 100 }\n"
        'parameters { key: "factor" value { string_value: "10" } }\n'
    )
    files = {"config.pbtxt": XY + own, "1/model.py": "broken(", "2/model.py": model, "2/data/offset.txt": "1"}
    folder = written(tmp_path / "m", files)
    stack.deploy(folder, "own", "--instances", "1")
    assert client.infer("own", {"x": column(1, 2)})["y"].tolist() == [[21], [41]]
    assert client.infer("own", {"x": column(1), "bias": column(5)})["y"].tolist() == [[26]]
    url = f"{stack.settings.gateway_url}/v2/models/own/infer"
    bias = {"name": "bias", "datatype": "FP32", "shape": [1, 1], "data": [1]}
    answer = httpx.post(url, json={"inputs": [bias]}, timeout=120)
    assert answer.status_code == 400
    assert "missing required input(s) ['x']" in answer.json()["error"]


def test_an_ensemble(stack: Stack, client: Client):
    stack.deploy(ENSEMBLES / "text-length", "text-length")
    texts = np.array([["a tide"], ["gate"], ["  spaces  "]], dtype=object)
    answer = client.infer("text-length", {"text": texts})
    assert answer["length"].tolist() == [[6], [4], [6]]
    typed = stack.cli("infer", "text-length", "--data", '{"text": [["  tide  "]]}')
    assert typed["outputs"][0]["data"] == [4]


def test_a_python_model_that_calls_its_neighbour(stack: Stack, client: Client):
    stack.deploy(ENSEMBLES / "retry", "retry")
    assert client.infer("retry", {"x": column(2, 100)})["y"].tolist() == [[4], [20]]


def test_a_scikit_learn_pipeline(stack: Stack, client: Client, tmp_path: Path):
    python = stack.settings.runtime_path / "model-env" / "bin" / "python3"
    subprocess.run([python, "-c", PIPELINE, tmp_path], check=True, timeout=120)
    refused = stack.run("deploy", str(tmp_path / "iris.joblib"), "--name", "iris")
    assert refused.returncode != 0
    assert "--allow-pickle" in refused.stdout + refused.stderr
    stack.deploy(tmp_path / "iris.joblib", "iris", "--allow-pickle")
    with np.load(tmp_path / "held.npz") as file:
        x, label, probabilities = file["x"], file["label"], file["probabilities"]
    answer = client.infer("iris", {"input": x[:60]})
    assert answer["label"].tolist() == label[:60].tolist()
    assert np.array_equal(answer["probabilities"], probabilities[:60])
    ones = [client.infer("iris", {"input": row[None]})["label"][0] for row in x[60:]]
    assert ones == label[60:].tolist()


def test_torchscript_without_torch_names_the_remedy(stack: Stack, tmp_path: Path):
    if TritonInstall.find(Settings().runtime_path).has_module("torch"):
        pytest.skip(
            "torch is in the models' environment: tests/integration/worker/test_torchscript.py uses it"
        )
    path = tmp_path / "net.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("net/constants.pkl", "")
        file.writestr("net/code/__torch__.py", "")
    signature = written(tmp_path, {"signature.json": json.dumps(TEXTS)}) / "signature.json"
    done = stack.run("deploy", str(path), "--name", "net", "--signature", str(signature), "--timeout", "150")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "`make torch`" in done.stdout + done.stderr
    assert "--requirements" in done.stdout + done.stderr
    stack.cli("delete", "net", "--yes")


def test_a_next_version_takes_over_while_nobody_asks(
    stack: Stack, client: Client, deploy_python: Callable[..., str], tmp_path: Path
):
    signature = "examples/python-model/identity/signature.json"
    # It would be asleep again before it is ready.
    options = ["--signature", signature, "--min", "0", "--max", "1", "--scale-to-zero-after", "0"]
    source = """
import time
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        time.sleep(1)

    def execute(self, requests):
        x = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", value * {factor})]) for value in x]
"""
    path = tmp_path / "model.py"
    for factor in (1, 2):
        path.write_text(source.replace("{factor}", str(factor)))
        stack.deploy(path, "quiet", *options)
        number = stack.cli("versions", "quiet")["items"][-1]["number"]
        answer = client.infer("quiet", {"x": np.ones((1, 16), np.float32)}, timeout_s=60)
        assert (answer["y"][0, 0], answer.model_version) == (factor, str(number))


def test_a_response_cache_is_hit_and_counted(stack: Stack, client: Client, tmp_path: Path):
    source = """
import numpy as np, time
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        at = time.time()
        rows = [len(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()) for request in requests]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("y", np.full((n, 1), at % 1000, np.float32))])
            for n in rows
        ]
"""
    files = {"config.pbtxt": XY + "response_cache { enable: true }\n", "1/model.py": source}
    stack.deploy(written(tmp_path / "kept", files), "kept", "--resource", "response_cache_mb=8")
    first = client.infer("kept", {"x": column(1)})["y"].tolist()
    assert [client.infer("kept", {"x": column(1)})["y"].tolist() for _ in range(4)] == [first] * 4
    assert client.infer("kept", {"x": column(2)})["y"].tolist() != first
    url = f"{stack.settings.gateway_url}/v2/models/kept"
    asked = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
    refused = httpx.post(
        f"{url}/infer", json={**asked, "parameters": {"mode": 2}}, trust_env=False, timeout=PATIENCE_S
    )
    assert refused.status_code == 400
    assert "ignores the parameters of a request (mode)" in refused.json()["error"]
    for _ in range(1200):  # workers tell what they counted once a second
        told = httpx.get(f"{url}/stats", trust_env=False, timeout=PATIENCE_S).json()["model_stats"][0][
            "inference_stats"
        ]
        if told["cache_hit"]["count"] == 4:
            break
        time.sleep(0.1)
    assert told["cache_hit"]["count"] == 4


def test_plain_python(stack: Stack, client: Client, tmp_path: Path):
    stack.deploy(PLAIN / "shout.py", "plain-shout")
    assert client.infer("plain-shout", {"text": ["tide"]})["output"].tolist() == [b"TIDE"]
    typed = stack.cli("infer", "plain-shout", "--data", '{"text": "tide", "times": 2}')
    assert typed["outputs"][0]["data"] == ["TIDE TIDE"]

    path = tmp_path / "mine.py"
    path.write_text("import numpy as np\n\ndef predict(x: np.ndarray):\n    return x\n")
    refused = stack.run("deploy", str(path))
    assert refused.returncode != 0
    told = " ".join((refused.stdout + refused.stderr).split())
    assert 'def predict(x: Tensor["FP32", -1, 4])' in told
    assert "--signature" in told
    assert "upload" not in told
    assert stack.run("versions", "mine").returncode != 0, "no version was made"

    path.write_text("import xgboost\n\ndef predict(x: float) -> float:\n    return x\n")
    failed = stack.run("deploy", str(path), "--timeout", "150")
    assert failed.returncode == 4
    assert "--requirements requirements.txt" in " ".join((failed.stdout + failed.stderr).split())
    stack.cli("delete", "mine", "--yes")


def test_plain_python_in_batches(stack: Stack, client: Client):
    stack.deploy(PLAIN / "distance.py", "plain-distance", "--batch-window-ms", "200")
    points = [np.array([[3, 4], [6, 8]]), np.array([[np.inf, 0]]), np.array([[0, 1]])]
    with ThreadPoolExecutor(len(points)) as pool:
        answers = [
            pool.submit(client.infer, "plain-distance", {"point": p.astype(np.float32)}) for p in points
        ]
    # They shared a call; the one at fault failed alone.
    assert answers[0].result()["distance"].tolist() == [5, 10]
    assert answers[0].result()["label"].tolist() == [b"near", b"far"]
    assert answers[2].result()["distance"].tolist() == [1]
    with pytest.raises(ModelFailed, match="ValueError: a point must be finite") as refused:
        answers[1].result()
    assert "Traceback" not in refused.value.message


def test_plain_python_as_a_stream(stack: Stack):
    stack.deploy(PLAIN / "words.py", "plain-words")
    url = f"{stack.settings.gateway_url}/v2/models/plain-words"
    answer = httpx.post(f"{url}/generate_stream", json={"text": "to be"}, timeout=120, trust_env=False)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [event["output"] for event in events if "output" in event] == ["to", "be"]
