"""Archives of other systems: what is mapped, and that their code is called as it was there."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.imports import hugging_face, mlflow, sagemaker, torchserve
from tidegate.cli.imports.mlflow_server import TrackingServer
from tidegate.cli.imports.plan import ImportPlan
from tidegate.kernel.protocol import python_model, python_signature
from tidegate.kernel.protocol.models import VersionMetadata

pytestmark = pytest.mark.unit

SCRIPT = """
import json, os, numpy as np
import pandas as pd

def model_fn(model_dir):
    with open(os.path.join(model_dir, "weights.json")) as file:
        return np.array(json.load(file))

def input_fn(request_body, request_content_type):
    assert request_content_type == "application/json"
    return np.array(json.loads(request_body)["x"])

def predict_fn(data, model):
    return data @ model

def output_fn(prediction, accept):
    return json.dumps({"y": prediction.tolist()}), accept
"""
HANDLER = """
import json
from pathlib import Path

class Words:
    def initialize(self, context):
        self.home = Path(context.system_properties["model_dir"])
        self.words = json.loads((self.home / "words.json").read_text())

    def handle(self, data, context):
        texts = [row.get("data") or row.get("body") for row in data]
        return [{"found": [word for word in self.words if word in text.decode()]} for text in texts]
"""
MANIFEST = {
    "runtime": "python",
    "model": {"modelName": "words", "handler": "words.py", "modelVersion": "1.0"},
}


def tar_of(path: Path, files: Mapping[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def mar_of(path: Path, files: Mapping[str, str], manifest: Any = MANIFEST) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@contextmanager
def served(plan: ImportPlan) -> Iterator[Any]:
    """Load the folder of a plan as the worker does, in this process."""
    before, paths = set(sys.modules), list(sys.path)
    try:
        spec = importlib.util.spec_from_file_location("imported_model", plan.path / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module.Model()
    finally:
        sys.path[:] = paths
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", "") and str(plan.path) in str(
                sys.modules[name].__file__
            ):
                del sys.modules[name]


def whole_body(plan: ImportPlan) -> list[str]:
    source = python_model.read(python_model.parsed((plan.path / "model.py").read_bytes()))
    signature = python_signature.signature_of(source, None)
    assert {(each.datatype, tuple(each.shape)) for each in (*signature.inputs, *signature.outputs)} == {
        ("BYTES", (1,))
    }
    VersionMetadata.model_validate(plan.metadata)
    return [each.name for each in signature.inputs]


def test_a_sagemaker_script_is_called_as_its_container_does(tmp_path: Path) -> None:
    archive = tar_of(
        tmp_path / "churn.tar.gz",
        {"code/inference.py": SCRIPT, "code/requirements.txt": "tidepool==1\n", "weights.json": "[1, 2]"},
    )
    plan = sagemaker.plan_of(archive, None, tmp_path / "work", None)
    assert (plan.name, plan.format, plan.requirements) == ("churn", "python", ["tidepool==1", "pandas"])
    assert whole_body(plan) == ["body", "content_type", "accept"]
    script = plan.path / "artifact" / "code" / "inference.py"
    script.write_text(SCRIPT.replace("import pandas as pd\n", ""))
    with served(plan) as model:
        model.load(plan.path)
        answer = model.predict(b'{"x": [3, 4]}', "application/json", "application/json")
    assert answer == {"body": b'{"y": 11}', "content_type": "application/json"}


def test_the_defaults_of_sagemaker_read_and_write_csv(tmp_path: Path) -> None:
    script = "import numpy as np\nclass M:\n    predict = staticmethod(lambda x: x.sum(axis=1))\n"
    script += "def model_fn(model_dir, context=None):\n    return M()\n"
    archive = tar_of(tmp_path / "sums.tar.gz", {"code/inference.py": script})
    plan = sagemaker.plan_of(archive, None, tmp_path / "work", None)
    with served(plan) as model:
        model.load(plan.path)
        found = model.predict(b"1,2\n3,4", "text/csv", "text/csv")
        assert found == {"body": b"3.0\n7.0\n", "content_type": "text/csv"}
        assert json.loads(model.predict(b"[[1, 2]]")["body"]) == [3]
        with pytest.raises(ValueError, match="is not supported without an input_fn"):
            model.predict(b"x", "image/png")


@pytest.mark.parametrize(
    ("files", "format_", "file"),
    [
        ({"model.joblib": "\x80"}, None, "model.joblib"),
        ({"xgboost-model": '{"learner": {}}', "notes.md": ""}, "xgboost", "model.json"),
        ({"net.onnx": ""}, None, "net.onnx"),
        ({"export/1/saved_model.pb": "", "export/1/variables/variables.index": ""}, "tensorflow", "1"),
    ],
)
def test_a_sagemaker_archive_without_code(
    tmp_path: Path, files: dict[str, str], format_: str | None, file: str
) -> None:
    plan = sagemaker.plan_of(tar_of(tmp_path / "m.tar.gz", files), None, tmp_path / "work", None)
    assert (plan.format, plan.path.name) == (format_, file)
    assert plan.path.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"code/inference.py": "def predict_fn(): ..."}, "has no model_fn"),
        ({"code/inference.py": "def ("}, "not valid Python"),
        ({"code/serve.py": ""}, r"has no script code/inference\.py\..*serve\.py.*--entry-point"),
        ({"readme.md": ""}, r"known framework \(0 found\)"),
        ({"a.onnx": "", "b.onnx": ""}, r"known framework \(2 found\)"),
        ({"xgboost-model": "\x80\x04"}, "pickled Booster"),
        ({"../evil": ""}, "not a path below its root"),
    ],
)
def test_a_sagemaker_archive_that_cannot_be_mapped_says_why(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    archive = tmp_path / "m.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            data = text.encode("latin-1")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UsageError, match=message):
        sagemaker.plan_of(archive, None, tmp_path / "work", None)


def test_a_handler_of_torchserve_is_called_as_it_is_there(tmp_path: Path) -> None:
    archive = mar_of(tmp_path / "w.mar", {"words.py": HANDLER, "words.json": '["tide", "gate"]'})
    plan = torchserve.plan_of(archive, None, tmp_path / "work")
    assert (plan.name, plan.format, plan.requirements) == ("words", "python", [])
    assert whole_body(plan) == ["body", "content_type"]
    with served(plan) as model:
        model.load(plan.path, "cpu")
        found = model.predict(b"a tide comes", "text/plain")
    assert json.loads(found["body"]) == {"found": ["tide"]}
    assert found["content_type"] == "application/json"


def test_a_function_of_a_torchserve_handler(tmp_path: Path) -> None:
    source = "def echo(data, context):\n    return [row['body'] for row in data]\n"
    manifest = {"model": {"modelName": "echo", "handler": "echo.py:echo"}}
    plan = torchserve.plan_of(
        mar_of(tmp_path / "e.mar", {"echo.py": source}, manifest), "mine", tmp_path / "w"
    )
    assert plan.name == "mine"
    with served(plan) as model:
        model.load(plan.path, "cpu")
        assert json.loads(model.predict(b'{"a": 1}', "application/json")["body"]) == {"a": 1}
        assert model.predict(b"\x00\xff")["body"] == b"\x00\xff"


def test_a_built_in_handler_needs_its_packages(tmp_path: Path) -> None:
    manifest = {"model": {"modelName": "net", "handler": "image_classifier", "serializedFile": "net.pt"}}
    archive = mar_of(tmp_path / "n.mar", {"net.pt": "x", "index_to_name.json": "{}"}, manifest)
    plan = torchserve.plan_of(archive, None, tmp_path / "work")
    assert plan.requirements == ["pillow", "torch"]
    facts = json.loads((plan.path / "tidegate_import.json").read_text())
    assert facts["module"] == "ts.torch_handler.image_classifier"
    assert (plan.path / "torchserve" / "ts" / "torch_handler" / "image_classifier.py").is_file()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({}, "no readable MAR-INF"),
        ({"model": {"handler": "image_segmenter"}}, "neither a file of the archive nor one of base_handler"),
        ({"model": {"handler": "base_handler", "serializedFile": "gone.pt"}}, r"lacks the file gone\.pt"),
        ({"model": {"handler": "../words.py"}}, "no path in the archive"),
        ({"model": {"handler": "base_handler", "requirementsFile": "/etc/hosts"}}, "no path in the archive"),
    ],
)
def test_a_bad_torchserve_archive_says_what_is_wrong(tmp_path: Path, manifest: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        torchserve.plan_of(mar_of(tmp_path / "n.mar", {}, manifest), None, tmp_path / "work")


def test_a_tracking_server_cannot_make_its_caller_copy_any_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "key").write_text("secret")
    with pytest.raises(UsageError, match="a folder of the tracking server's machine"):
        TrackingServer("http://127.0.0.1:1", {})._fetch(f"file://{tmp_path}/mine", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_mlflow_folder_reports_what_is_mapped(tmp_path: Path) -> None:
    folder = tmp_path / "churn"
    folder.mkdir()
    (folder / "MLmodel").write_text(
        "flavors:\n  python_function: {loader_module: mlflow.xgboost, data: model.ubj}\n"
        "  xgboost: {data: model.ubj, model_class: xgboost.core.Booster, xgb_version: 3.2.0}\n"
        "run_id: 4f1c\nutc_time_created: '2026-11-29 21:00:00.123456'\n"
        'signature:\n  inputs: \'[{"type": "double", "name": "age", "required": true}]\'\n'
        '  outputs: \'[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1]}}]\'\n'
        '  params: \'[{"name": "margin", "type": "boolean"}]\'\n'
    )
    (folder / "model.ubj").write_bytes(b"{")
    (folder / "requirements.txt").write_text("mlflow==3.17.2\nxgboost-cpu==3.2.0\n")
    plan = mlflow.plan_of(folder, None, str(folder), {"metrics": {"auc": 0.9}}, signed=False)
    VersionMetadata.model_validate(plan.metadata)
    assert (plan.name, plan.format, plan.pickled) == ("churn", "mlflow", "")
    assert plan.metadata["run"] == "4f1c"
    assert plan.metadata["metrics"] == {"auc": 0.9}
    assert ("signature", "age FP64 -> output FP32") in plan.mapped
    assert ("requirements", "xgboost-cpu==3.2.0, pandas") in plan.mapped
    assert [there for there, _ in plan.left] == ["params of the signature"]
    with pytest.raises(UsageError, match="no file MLmodel"):
        mlflow.plan_of(tmp_path, None, "x", {}, signed=False)


def test_a_hugging_face_folder_reports_what_is_mapped(tmp_path: Path) -> None:
    folder = tmp_path / "sentiment"
    folder.mkdir()
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    plan = hugging_face.plan_of(folder, None)
    assert (plan.name, plan.format, plan.pickled) == ("sentiment", "huggingface", "the weights are a pickle")
    (folder / "model.safetensors").write_text("")
    plan = hugging_face.plan_of(folder, None)
    assert plan.pickled == ""
    assert plan.left == [("other files (1)", "copies of the weights, and git's files, are not uploaded")]
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    assert hugging_face.plan_of(folder, None).format == "llm"
