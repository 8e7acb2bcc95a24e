"""Plan the import of a SageMaker ``model.tar.gz``: an inference script, or a model file."""

from __future__ import annotations

from pathlib import Path

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.imports import scripts
from tidegate.cli.imports.archives import unpack
from tidegate.cli.imports.plan import ImportPlan
from tidegate.kernel.protocol import names

CODE, ENTRY = "code", "inference.py"
_PICKLES = (".joblib", ".pkl", ".pickle")
# The library or format of a model file, by file extension. This table is used only for archives that have no
# script.
_KNOWN = {
    ".joblib": "scikit-learn", ".pkl": "a pickle", ".pickle": "a pickle", ".onnx": "ONNX",
    ".json": "XGBoost", ".ubj": "XGBoost", ".xgb": "XGBoost", ".txt": "LightGBM", ".cbm": "CatBoost",
    ".pt": "TorchScript", ".pth": "TorchScript", ".pt2": "torch.export", ".skops": "scikit-learn",
}  # fmt: skip
_XGBOOST = "xgboost-model"
_CONTRACT = ("model_fn", "input_fn", "predict_fn", "output_fn", "transform_fn")


def plan_of(archive: Path, name: str | None, work: Path, entry: str | None) -> ImportPlan:
    """Return the plan for an archive. Raise UsageError if Tidegate cannot run the model.

    ``work``: an empty folder to write into. ``entry``: the script in the archive's folder ``code``; None for
    ``inference.py``.
    """
    folder = work / "model"
    unpack(archive, folder / scripts.ARTIFACT)
    found = name or names.fitting(archive.name.removesuffix(".gz").removesuffix(".tar")) or "model"
    plan = ImportPlan(str(archive), folder, found)
    plan.metadata = {"tags": {"imported": "sagemaker"}}
    home = folder / scripts.ARTIFACT
    script = home / CODE / (entry or ENTRY)
    if script.is_file():
        _script(plan, home, script)
    elif entry is not None or (home / CODE).is_dir():
        there = ", ".join(path.name for path in scripts.python_files(home / CODE)[:8]) or "no Python file"
        raise UsageError(
            f"{archive} has no script code/{entry or ENTRY}. Its folder code/ has: {there}. Name the script: "
            "--entry-point FILE.py"
        )
    elif (
        (home / "saved_model.pb").exists()
        or list(home.glob("*/saved_model.pb"))
        or list(home.glob("*/*/saved_model.pb"))
    ):
        plan.format, plan.path = "tensorflow", _only_parent(home, "saved_model.pb")
        plan.map("TensorFlow SavedModel", "format tensorflow")
    else:
        _file(plan, home)
    return plan


def _script(plan: ImportPlan, home: Path, script: Path) -> None:
    functions = _functions(script)
    if "model_fn" not in functions:
        raise UsageError(
            f"code/{script.name} has no model_fn, and Tidegate lacks the default model_fn of SageMaker's "
            "container. Add `def model_fn(model_dir)` that returns the model, and pack the archive again."
        )
    scripts.write(plan.path, "sagemaker", {"code": CODE, "module": script.stem})
    plan.format = "python"
    for function in _CONTRACT:
        if function in functions:
            plan.map(
                f"code/{script.name} {function}",
                "called in each replica" if function == "model_fn" else "called for each request",
            )
    if "transform_fn" not in functions and not {"input_fn", "output_fn"} <= functions:
        plan.map("default input_fn and output_fn", "JSON, CSV and NumPy's format")
    plan.map(
        "the body and its Content-Type",
        "inputs body, content_type, accept; /endpoints/NAME/invocations passes them through",
    )
    scripts.map_requirements(plan, home / CODE / "requirements.txt", scripts.python_files(home / CODE))
    plan.leave("SageMaker's environment variables", "set the variables that the script reads: --env K=V")


def _file(plan: ImportPlan, home: Path) -> None:
    """Plan an archive without a script: deploy its only model file.

    Raise UsageError if the archive does not contain exactly one model file of a known framework.
    """
    files = [path for path in sorted(home.rglob("*")) if path.is_file()]
    known = [path for path in files if path.name.startswith(_XGBOOST) or path.suffix in _KNOWN]
    if len(known) != 1:
        listed = ", ".join(str(path.relative_to(home)) for path in files[:8]) or "nothing"
        raise UsageError(
            f"{plan.source} has neither code/{ENTRY} nor exactly one model file of a known framework "
            f"({len(known)} found). Its files: {listed}. Unpack the archive, and deploy the model's file: "
            "tidegate deploy FILE --name NAME"
        )
    (path,) = known
    plan.path = path
    if path.name.startswith(_XGBOOST):
        _xgboost(plan, path)
    else:
        plan.map(path.name, f"a file of {_KNOWN[path.suffix]}; the registry recognises its contents")
    if path.suffix in _PICKLES:
        plan.pickled = f"{path.name} is a pickle"
    for other in files:
        if other != path:
            plan.leave(str(other.relative_to(home)), "only the model's file is uploaded")


def _xgboost(plan: ImportPlan, path: Path) -> None:
    """Rename SageMaker's XGBoost model file to ``model.json`` or ``model.ubj``, to match its contents."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(b"\x80"):
        raise UsageError(
            f"{path.name} is a pickled Booster of an old container. Load it with the xgboost that saved it, "
            "and save it with booster.save_model('model.ubj'). Then: tidegate deploy model.ubj"
        )
    plan.path = path.rename(
        path.with_name("model.json" if head.lstrip()[:1] == b"{" and head[1:2] != b"L" else "model.ubj")
    )
    plan.format = "xgboost"
    plan.map(path.name, "format xgboost")


def _functions(script: Path) -> set[str]:
    import ast

    try:
        tree = ast.parse(script.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as problem:
        raise UsageError(f"code/{script.name} is not valid Python: {problem}.") from None
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    imported = (alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names)
    return found | {alias.asname or alias.name for alias in imported}


def _only_parent(home: Path, name: str) -> Path:
    found = sorted(path.parent for path in home.rglob(name))
    if len(found) > 1:
        raise UsageError(
            f"The archive has {len(found)} files called {name}; expected one. Unpack the archive, and deploy "
            "one of the folders: tidegate deploy FOLDER --name NAME"
        )
    return found[0]
