"""Users' folders and archives: requirements, optional inputs, and which of several models is served."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from services.registry.adapters import artifact_inspection
from services.registry.adapters.sql import migrate
from services.registry.adapters.sql.database import RegistryDatabase, engine_for
from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import SequenceSpec

Look = Callable[..., artifact_inspection.Inspection]

XY = (
    'backend: "python" max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }'
    ' output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }'
)
CODE = (
    "class TritonPythonModel:\n    def auto_complete_config(c): ...\n    def execute(self, requests): ...\n"
)


def ensemble(*parts: str) -> str:
    steps = ", ".join(f'{{ model_name: "{part}" model_version: -1 }}' for part in parts)
    return XY.replace('backend: "python"', f'platform: "ensemble" ensemble_scheduling {{ step [ {steps} ] }}')


def packed(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture
def look(tmp_path: Path) -> Look:
    def run(files: dict[str, str], format_: Any = "triton") -> artifact_inspection.Inspection:
        path = tmp_path / "artifact"
        path.write_bytes(packed(files))
        return artifact_inspection.inspect(
            path, format_, model="m", user_signature=None, max_batch=64, limits=ArchiveLimits()
        )

    return run


def test_an_optional_input(look):
    found = look({"config.pbtxt": f"{XY} input {{ name: 'b' data_type: TYPE_FP32 dims: 1 optional: true }}",
                  "1/model.py": CODE})  # fmt: skip
    assert [(t.name, t.optional) for t in found.signature.inputs] == [("x", False), ("b", True)]


def test_the_outermost_ensemble_is_served(look):
    files = {
        "part/config.pbtxt": XY, "part/1/model.py": CODE, "part/1/requirements.txt": "six\n",
        "inner/config.pbtxt": ensemble("part"),
        "outer/config.pbtxt": ensemble("inner", "part").replace("max_batch_size: 4", "max_batch_size: 2"),
        "requirements.txt": "tidepool>=1 # for all\n",
    }  # fmt: skip
    found = look(files)
    assert found.signature.max_batch_size == 2
    assert found.requirements == ["six", "tidepool>=1"]


def test_a_stateful_model(look):
    batching = "max_sequence_idle_microseconds: 5000000 oldest { max_candidate_sequences: 9 }"
    stateful = f"{XY} sequence_batching {{ {batching} }}"
    found = look({"config.pbtxt": stateful, "1/model.py": CODE}).signature.sequences
    assert found == SequenceSpec(strategy="oldest", slots=9, idle_ms=5000)
    files = {
        "part/config.pbtxt": stateful, "part/1/model.py": CODE,
        "outer/config.pbtxt": ensemble("part"), "outer/1/.keep": "",
    }  # fmt: skip
    assert look(files).signature.sequences == found, "an ensemble of a stateful model is stateful"
    direct = look({"config.pbtxt": f"{XY} sequence_batching {{ }}", "1/model.py": CODE}).signature
    assert direct.sequences == SequenceSpec(slots=max(1, direct.max_batch_size), idle_ms=1000)
    iterative = f"{XY} sequence_batching {{ iterative_sequence: true }}"
    assert look({"config.pbtxt": iterative, "1/model.py": CODE}).signature.sequences is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.pbtxt": XY, "model.py": CODE}, "no version folder with a file in it"),
        ({"a/config.pbtxt": XY, "a/x/model.py": CODE, "b/config.pbtxt": ensemble("a")}, "in a/1/"),
        (
            {"config.pbtxt": XY, "1/model.py": CODE, "requirements.txt": "-r x"},
            "requirements.txt: the option",
        ),
    ],
)
def test_what_is_refused(look, files, message):
    with pytest.raises(BadRequest, match=message):
        look(files)


def test_a_folder_with_a_python_model(look):
    files = {"model.py": CODE, "own/deep.py": "", "requirements.txt": "six\n", "own/requirements.txt": "no\n"}
    assert look(files, "python").requirements == ["six"]
    with pytest.raises(BadRequest, match=r"needs model\.py at its root"):
        look({"deep/model.py": CODE}, "python")
    with pytest.raises(BadRequest, match="class TritonPythonModel"):
        look({"model.py": "x = 1"}, "python")
    with pytest.raises(BadRequest, match="below its root"):
        look({"model.py": CODE, "../x": ""}, "python")


async def test_requirements_belong_to_the_version(call):
    archive = packed({"model.py": CODE, "requirements.txt": "six\n"})
    own = {"filename": "m.tar.gz", "format": "python"}
    first = await call.register("m", archive, **own)
    assert (first["number"], first["requirements"]) == (1, ["six"])
    assert (await call.register("m", archive, **own))["number"] == 1
    other = await call.register("m", archive, **own, requirements=["six==1.16  # pinned", ""])
    assert (other["number"], other["requirements"]) == (2, ["six==1.16"])
    none = await call.register("m", archive, **own, requirements=[])
    assert (none["number"], none["requirements"]) == (3, [])
    assert (await call("GET", "/v1/models/m/versions/1"))["requirements"] == ["six"]
    plain = await call.register("plain", onnx_bytes(1), requirements=["six"])
    assert plain["requirements"] == ["six"]
    body = {"artifact": first["artifact_sha256"], **own, "requirements": ["./x.whl"]}
    refused = await call("POST", "/v1/models/m/versions", body, status=400)
    assert "does not exist on a worker" in refused["error"]


async def test_versions_from_before_the_column_have_no_requirements(database_url):
    engine = engine_for(database_url).execution_options(registry_writes=True)
    async with engine.begin() as connection:
        await connection.run_sync(lambda c: command.downgrade(migrate.config_for(c), "0001"))
        for statement in (
            f"INSERT INTO artifacts VALUES ('{'0' * 64}', 1, '2026-01-02 03:04:05', NULL)",
            "INSERT INTO models VALUES ('m', 1, '2026-01-02 03:04:05')",
            "INSERT INTO versions (model, number, format, artifact_sha256, filename, metadata, created_at)"
            f" VALUES ('m', 1, 'onnx', '{'0' * 64}', 'm.onnx', '{{}}', '2026-01-02 03:04:05')",
            "INSERT INTO deployments VALUES"
            " ('m-v1', 'm', 1, '{}', false, NULL, NULL, 1, '2026-01-02 03:04:05')",
        ):
            await connection.execute(sa.text(statement))
    await engine.dispose()
    await migrate.migrate(database_url)
    database = RegistryDatabase(database_url)
    async with database.read() as reader:
        desired_state = await reader.desired_state()
    await database.close()
    assert [version.requirements for version in desired_state.versions] == [[]]
    assert [deployment.name for deployment in desired_state.deployments] == ["m-v1"]


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("id",)


def test_an_mlflow_folder_is_read_and_its_pickle_is_checked(tmp_path: Path) -> None:
    tensor = '[{"type": "tensor", "tensor-spec": {"dtype": "float64", "shape": [-1, 4]}}]'
    described = (
        "flavors:\n  python_function: {loader_module: mlflow.sklearn, model_path: model.pkl}\n"
        "  sklearn: {pickled_model: model.pkl}\n"
        f"signature:\n  inputs: '{tensor}'\n  outputs: '{tensor}'\n"
    )

    def look(pickled: bytes, **more: Any) -> artifact_inspection.Inspection:
        path = tmp_path / "artifact"
        with tarfile.open(path, "w:gz") as tar:
            for name, data in (
                ("MLmodel", described.encode()),
                ("model.pkl", pickled),
                ("requirements.txt", b"mlflow==3.17.2\nscikit-learn==1.9.1\nnumpy==2.3.5\n"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return artifact_inspection.inspect(
            path, "mlflow", model="m", user_signature=None, max_batch=64, limits=ArchiveLimits(), **more
        )

    found = look(pickle.dumps({"a": 1}), allow_pickle=True)
    assert found.requirements == ["scikit-learn==1.9.1"]
    assert "numpy==2.3.5" in found.notes[0]
    assert found.signature is not None
    assert [(each.name, each.shape) for each in found.signature.inputs] == [("input", [4])]
    with pytest.raises(BadRequest, match="--allow-pickle"):
        look(pickle.dumps({"a": 1}))
    with pytest.raises(BadRequest, match="system"):
        look(pickle.dumps(Runs()), allow_pickle=True)
