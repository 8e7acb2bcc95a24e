"""Write the folder of a Python model that runs an archive made for SageMaker or TorchServe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidegate.cli.imports import code_needs
from tidegate.cli.imports.plan import ImportPlan
from tidegate.kernel.protocol.mlflow_requirements import name_of

SHIMS = Path(__file__).parent / "shims"
ARTIFACT, FACTS = "artifact", "tidegate_import.json"
# Packages that the containers of SageMaker and TorchServe have. The folder `shims` has a replacement only for
# `ts`. If a script imports another of these packages, the plan reports the import as not mapped.
_FOREIGN = {"sagemaker_inference", "sagemaker_containers", "sagemaker_training", "mms", "ts"}


def write(folder: Path, shim: str, facts: Mapping[str, Any]) -> None:
    """Copy a shim into ``folder`` as ``model.py``, and write ``facts`` into a JSON file beside it.

    ``shim``: ``sagemaker`` or ``torchserve``. ``facts``: values that ``model.py`` reads.
    """
    shutil.copyfile(SHIMS / f"{shim}_model.py", folder / "model.py")
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    more = SHIMS / shim
    if more.is_dir():
        shutil.copytree(more, folder / shim, ignore=shutil.ignore_patterns("__pycache__"))


def map_requirements(plan: ImportPlan, file: Path, code: list[Path], *, extra: tuple[str, ...] = ()) -> None:
    """Set the plan's requirements: those of the archive, and packages that its code imports.

    ``file``: the archive's requirements file. ``code``: the archive's Python files. ``extra``: packages that
    the shim needs.
    """
    stated = code_needs.lines_of(file)
    modules = code_needs.modules_in(code)
    added = [line for line in code_needs.missing(modules, stated) if line not in extra]
    known = {name_of(line) for line in stated}
    added += [line for line in extra if line not in known]
    plan.requirements = [*stated, *sorted(added)]
    if stated:
        plan.map(file.name, ", ".join(stated))
    if added:
        plan.map(
            "packages of the container", f"requirements {', '.join(sorted(added))}, in their latest release"
        )
    for name in sorted(modules & _FOREIGN - {"ts"}):
        plan.leave(
            f"import {name}",
            "made for the other system's container; if the package works here too, add it as a requirement",
        )


def python_files(folder: Path) -> list[Path]:
    """Return the Python files of a folder."""
    return sorted(path for path in folder.rglob("*.py") if path.is_file())
