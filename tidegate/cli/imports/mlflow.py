"""Plan the import of an MLflow model, from a folder or from an MLflow tracking server."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.imports.plan import ImportPlan
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import mlflow_model, mlflow_requirements, mlflow_signature, names

# The most rows in a call, equal to the registry's default. `tidegate deploy --max-batch` overrides it.
_MAX_BATCH = 64


def plan_of(
    folder: Path, name: str | None, source: str, facts: dict[str, Any], *, signed: bool
) -> ImportPlan:
    """Return the plan for a folder with ``MLmodel``. Raise UsageError if Tidegate cannot run the model.

    ``facts``: the version's metadata from a tracking server. ``signed``: True if the user gives
    ``--signature``. Then the signature in ``MLmodel`` is ignored.
    """
    file = folder / mlflow_model.FILE
    if not file.is_file():
        raise UsageError(
            f"{folder} has no file {mlflow_model.FILE}, so it is not an MLflow model. Name the folder "
            "that has it."
        )
    try:
        model = mlflow_model.parsed(file.read_text())
        files = [PurePosixPath(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()]
        loading = mlflow_model.loading(model, files)
        signature = None if signed else mlflow_signature.signature_of(model, None, _MAX_BATCH)
        requirements, notes = _requirements(folder, model, loading)
    except BadRequest as problem:
        raise UsageError(problem.message) from None
    plan = ImportPlan(
        source,
        folder,
        name or names.fitting(str(facts.pop("name", "")) or folder.resolve().name) or "model",
        "mlflow",
        metadata={
            key: value for key, value in (_own_facts(model) | facts).items() if value not in (None, "", {})
        },
    )
    plan.map(
        f"flavour {loading.engine}", "format mlflow" + (f", file {loading.file}" if loading.file else "")
    )
    if signature is not None:
        inputs = ", ".join(f"{each.name} {each.datatype}" for each in signature.inputs)
        outputs = ", ".join(f"{each.name} {each.datatype}" for each in signature.outputs)
        plan.map("signature", f"{inputs} -> {outputs}")
    if requirements:
        plan.map("requirements", ", ".join(requirements))
    for key in plan.metadata:
        plan.map(f"{key} of the run" if key in ("metrics", "parameters") else key, f"metadata.{key}")
    for note in notes:
        plan.leave("a requirement", note)
    if (model.signature or {}).get("params"):
        plan.leave(
            "params of the signature", "requests cannot set these parameters; the model uses their defaults"
        )
    if (folder / "input_example.json").is_file():
        plan.leave(
            "input_example.json",
            "verification does not use this file; to give samples: tidegate deploy --check FILE.json",
        )
    plan.pickled = f"{loading.engine} loads its files with pickle" if loading.pickled else ""
    return plan


def _requirements(
    folder: Path, model: mlflow_model.MlflowModel, loading: mlflow_model.Loading
) -> tuple[list[str], list[str]]:
    texts = {
        name: (folder / name).read_text() for name in mlflow_requirements.FILES if (folder / name).is_file()
    }
    lines = [line.strip() for line in mlflow_requirements.lines_in(texts).splitlines()]
    stated = [line for line in lines if line and not line.startswith("#")]
    inputs = mlflow_signature.inputs_of(model)
    table = inputs is not None and inputs.columns is not None
    return mlflow_requirements.needed(stated, loading, model.mlflow_version or "", table=table)


def _own_facts(model: mlflow_model.MlflowModel) -> dict[str, Any]:
    native = next((name for name in mlflow_model.NATIVE if name in model.flavors), mlflow_model.PYFUNC)
    settings = model.flavors.get(native, {})
    version = next((str(value) for key, value in settings.items() if key.endswith("_version")), None)
    return {
        "framework": native,
        "framework_version": version,
        "run": model.run_id,
        "trained_at": f"{model.created.replace(' ', 'T')}Z" if model.created else None,
    }
