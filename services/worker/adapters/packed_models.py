"""Prepare a folder of MLflow or Hugging Face as a model for Triton's Python backend.

The folder is unpacked beside a file `model.py` of Tidegate. This file contains a class with the methods
`load` and `predict`. The runtime for plain Python calls this class.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from services.worker.adapters.archives import unpack
from services.worker.adapters.python_functions import RUNTIME, add_runtime
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import hugging_face
from tidegate.kernel.protocol.archives import home_of
from tidegate.kernel.protocol.hugging_face_task import CONFIG
from tidegate.kernel.protocol.models import Format, Signature, Version

_RUNTIMES = Path(__file__).parents[1] / "runtimes"
ARTIFACT = "artifact"


def is_packed_model(artifact_format: Format) -> bool:
    """Return True for a format that :func:`prepare` supports."""
    return artifact_format in _PLANS


def prepare(version: Version, artifact: Path, folder: Path) -> str:
    """Unpack the artifact into the new ``folder``. Return the name of the file that Triton must load.

    This function blocks. Raises ModelFailed if the signature or a needed file is missing. Raises BadRequest
    for a folder that the registry would reject.
    """
    signature = version.signature
    if signature is None:
        raise ModelFailed("The version has no signature. Register it again with --signature FILE.json.")
    unpack(artifact, folder / ARTIFACT)
    make_plan = _PLANS[version.format]
    runtime = _RUNTIMES / version.format
    plan = make_plan(folder / ARTIFACT, signature)
    (folder / f"tidegate_{version.format}.json").write_text(json.dumps(plan))
    for source in runtime.glob("*.py"):
        shutil.copyfile(source, folder / source.name)
    # For ONNX files, use the same code as for versions of the format onnx. If the GPU cannot be used, this
    # code raises an error and does not use the CPU.
    shutil.copyfile(_RUNTIMES / "onnx" / "model.py", folder / "onnx_session.py")
    shutil.copyfile(_RUNTIMES / "rows.py", folder / "rows.py")
    add_runtime(folder, calling_plan(signature))
    return RUNTIME


def calling_plan(signature: Signature) -> dict[str, Any]:
    """Return the plan by which the runtime calls ``Model.predict``, with an array for each input."""
    axes = [-1] if signature.max_batch_size else []
    return {
        "entry": "Model",
        "load": ["folder", "device", "threads"],
        "inputs": {spec.name: {"kind": "array", "text": False} for spec in signature.inputs},
        "outputs": [
            {"name": spec.name, "datatype": spec.datatype, "dims": [*axes, *spec.shape]}
            for spec in signature.outputs
        ],
        "rows": signature.max_batch_size,
        "streams": False,
        "asynchronous": False,
    }


def _mlflow(artifact: Path, signature: Signature) -> dict[str, Any]:
    """Return the plan for `runtimes/mlflow`. Also copy the module that reads pickles of numpy 2."""
    from tidegate.kernel.protocol import mlflow_model, mlflow_signature  # imports yaml, which takes long

    shutil.copyfile(_RUNTIMES / "sklearn" / "numpy_2_pickles.py", artifact.with_name("numpy_2_pickles.py"))
    files = _files(artifact)
    home = _home(files, mlflow_model.FILE)
    model = mlflow_model.parsed((artifact / home / mlflow_model.FILE).read_text())
    loading = mlflow_model.loading(model, [each.relative_to(home) for each in files if home in each.parents])
    schema = mlflow_signature.inputs_of(model)
    columns = mlflow_signature.columns_of(model, signature)
    return {
        "home": str(home),
        "code": str(model.flavors.get(mlflow_model.PYFUNC, {}).get("code") or ""),
        "engine": loading.engine,
        "file": loading.file,
        "pickled": loading.pickled,
        "function": loading.function,
        "kind": loading.kind,
        "trusted": list(loading.trusted),
        "columns": columns,
        "table": mlflow_model.takes_table(loading, named=columns is not None),
        "named": schema is not None and schema.named,
        "outputs": {spec.name: not spec.shape for spec in signature.outputs},
    }


def _hugging_face(artifact: Path, signature: Signature) -> dict[str, Any]:
    """Return the plan for `runtimes/huggingface`."""
    files = _files(artifact)
    home = _home(files, CONFIG)
    names = hugging_face.inside(files, home)
    texts = {
        name: (artifact / home / name).read_text()
        for name in names
        if PurePosixPath(name).name in hugging_face.TEXTS
    }
    # The registry has checked that pickled weights are allowed.
    plan = hugging_face.plan(texts, names, allow_pickle=True)
    return plan.document() | {"home": str(home)}


def _home(files: list[PurePosixPath], name: str) -> PurePosixPath:
    found = home_of(files, name)
    if found is None:
        raise ModelFailed(f"The archive has no {name}. Deploy the model's folder again.")
    return found


def _files(folder: Path) -> list[PurePosixPath]:
    return [PurePosixPath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


_PLANS: dict[Format, Callable[[Path, Signature], dict[str, Any]]] = {
    "mlflow": _mlflow,
    "huggingface": _hugging_face,
}
