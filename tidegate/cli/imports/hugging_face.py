"""Plan the import of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tidegate.cli import hugging_face_packages, llm_packages
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.imports.plan import ImportPlan
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import hugging_face, names

_MAX_BATCH = 64


def plan_of(folder: Path, name: str | None) -> ImportPlan:
    """Return the plan for a folder with ``config.json``. Raise UsageError for a model that cannot run."""
    config = _config(folder)
    plan = ImportPlan(str(folder), folder, name or names.fitting(folder.resolve().name) or "model")
    plan.metadata = {"framework": "transformers", "framework_version": config.get("transformers_version")}
    plan.metadata = {key: value for key, value in plan.metadata.items() if value}
    task = hugging_face_packages.task_of(folder)
    if task is None:
        if not llm_packages.is_llm_folder(folder):
            raise UsageError(
                f"{folder} has the architecture {config.get('architectures')}, which Tidegate does not run. "
                "Write a Python file that loads the model, and deploy the Python file (docs/models.md)."
            )
        plan.format, plan.options = "llm", {"llm": {"engine": "vllm"}}
        plan.map(f"architecture {_first(config)}", "format llm, engine vllm")
        return plan
    files = hugging_face_packages.files_of(folder)
    texts = {
        inner: path.read_text(errors="replace")
        for inner, path in files.items()
        if path.name in hugging_face.TEXTS and path.stat().st_size <= hugging_face.MAX_TEXT
    }
    try:
        found = hugging_face.plan(texts, files, allow_pickle=True)
        hugging_face.plan(texts, files, allow_pickle=False)
    except BadRequest as problem:
        if "--allow-pickle" not in problem.message:
            raise UsageError(problem.message) from None
        plan.pickled = "the weights are a pickle"
    plan.format = "huggingface"
    signature = hugging_face.signature_of(found, _MAX_BATCH)
    plan.requirements = hugging_face.requirements_of(found)
    plan.map(f"architecture {_first(config)}", f"format huggingface, {found.task}, run by {found.engine}")
    plan.map(
        "inputs and outputs",
        " -> ".join(", ".join(t.name for t in side) for side in (signature.inputs, signature.outputs)),
    )
    plan.map("packages", ", ".join(plan.requirements))
    skipped = sum(1 for path in folder.rglob("*") if path.is_file()) - len(files)
    if skipped:
        plan.leave(f"other files ({skipped})", "copies of the weights, and git's files, are not uploaded")
    if "auto_map" in config:
        plan.leave("code of the folder (auto_map)", "Tidegate runs only classes of transformers")
    return plan


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise UsageError(
            f"{folder} is not a Hugging Face folder: its config.json cannot be read ({problem}). Name the "
            "folder that has config.json."
        ) from None
    if not isinstance(found, dict):
        raise UsageError(f"{folder}/config.json is not a JSON object. Download the folder again.")
    return found


def _first(config: dict[str, Any]) -> str:
    names_ = config.get("architectures")
    return str(names_[0]) if isinstance(names_, list) and names_ else "unknown"
