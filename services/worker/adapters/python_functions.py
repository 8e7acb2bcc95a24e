"""Prepare a Python file with ``predict`` for Triton's Python backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tidegate.model
from tidegate.kernel.protocol import backend_class, python_model, python_signature
from tidegate.kernel.protocol.models import Version

_RUNTIMES = Path(__file__).parents[1] / "runtimes"
RUNTIME = "tidegate_runtime.py"


def adopt(folder: Path, version: Version) -> str | None:
    """Put the runtime beside ``model.py``, and return the name of the file that Triton must load.

    If ``model.py`` is already written for Triton's Python backend, change nothing and return None. Then
    Triton loads ``model.py`` itself. Raises BadRequest for a file that the registry would reject.
    """
    tree = python_model.parsed((folder / "model.py").read_bytes())
    if backend_class.is_for_the_backend(tree):
        return None
    source = python_model.read(tree)
    signature = python_signature.signature_of(source, version.signature)
    add_runtime(folder, python_signature.calling_plan(source, signature))
    return RUNTIME


def add_runtime(folder: Path, plan: Mapping[str, Any]) -> None:
    """Write the runtime beside ``model.py``, and the runtime's plan for the calls of ``predict``."""
    (folder / "tidegate_plan.json").write_text(json.dumps(plan))
    shutil.copyfile(_RUNTIMES / "function" / "model.py", folder / RUNTIME)
    shutil.copyfile(_RUNTIMES / "function" / "values.py", folder / "tidegate_values.py")
    shutil.copyfile(_RUNTIMES / "rows.py", folder / "tidegate_rows.py")
    sdk = folder / "tidegate_sdk" / "tidegate"
    sdk.mkdir(parents=True)
    shutil.copyfile(_RUNTIMES / "function" / "sdk.py", sdk / "__init__.py")
    shutil.copyfile(tidegate.model.__file__, sdk / "model.py")
