"""Decide which packages an MLflow model needs in its own environment. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tidegate.kernel.protocol.mlflow_model import (
    LIGHTGBM,
    PYFUNC,
    PYTORCH,
    SKLEARN,
    XGBOOST,
    Loading,
    takes_table,
    yaml_of,
)

PIP, CONDA = "requirements.txt", "conda.yaml"
FILES = frozenset({PIP, CONDA})
_MLFLOW = frozenset({"mlflow", "mlflow-skinny", "mlflow-tracing"})
# The package that each engine needs. It is added if the model's own requirements lack it.
_LIBRARY = {XGBOOST: "xgboost-cpu", LIGHTGBM: "lightgbm", PYTORCH: "torch"}
_NUMPY_2 = re.compile(r"numpy\s*(==|>=|~=|>)\s*[2-9]", re.IGNORECASE)
_AFTER_NAME = re.compile(r"[<>=!~;\[@ ]")


def lines_in(texts: Mapping[str, str]) -> str:
    """Return the lines for pip from ``requirements.txt``. If it is missing, read them from ``conda.yaml``.

    ``texts``: the contents of the files, by name.
    """
    if PIP in texts:
        return texts[PIP]
    if CONDA not in texts:
        return ""
    found = yaml_of(texts[CONDA], CONDA)
    parts = found.get("dependencies", ()) if isinstance(found, dict) else ()
    lines = [part["pip"] for part in parts if isinstance(part, dict) and isinstance(part.get("pip"), list)]
    return "\n".join(str(line) for each in lines for line in each)


def needed(
    lines: list[str], loading: Loading, mlflow_version: str, *, table: bool
) -> tuple[list[str], list[str]]:
    """Return the lines to pass to pip, and a note for each line that requires numpy 2 and is left out.

    MLflow itself is installed only for ``python_function``, and without its server. ``table``: True if the
    model's inputs are the columns of a table.
    """
    kept, notes = [], []
    for line in lines:
        name = name_of(line)
        if name in _MLFLOW:
            continue
        if name == "numpy" and _NUMPY_2.match(line):
            notes.append(
                f"The MLflow model requires {line}, but models here run with numpy 1.26. The line was left "
                "out: compare a few results with those from the required numpy."
            )
            continue
        kept.append(line)
    extra = [_LIBRARY[loading.engine]] if loading.engine in _LIBRARY else []
    if loading.engine == PYFUNC:
        extra = [f"mlflow-skinny=={mlflow_version}" if mlflow_version else "mlflow-skinny", "pandas"]
    elif loading.engine == SKLEARN and loading.file.endswith(".skops"):
        extra.append("skops")
    if takes_table(loading, named=table):
        extra.append("pandas")
    present = {name_of(line) for line in kept}
    if "xgboost" in present:
        present.add("xgboost-cpu")
    return [*kept, *(line for line in dict.fromkeys(extra) if name_of(line) not in present)], notes


def name_of(line: str) -> str:
    """Return the name of the package in a line for pip, in its normal form."""
    return re.sub(r"[-_.]+", "-", _AFTER_NAME.split(line.strip(), maxsplit=1)[0]).lower()
