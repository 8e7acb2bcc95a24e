"""Plan the import of a TorchServe archive, ``model.mar``: manifest, handler, weights and extra files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.imports import scripts
from tidegate.cli.imports.archives import unpack
from tidegate.cli.imports.plan import ImportPlan
from tidegate.kernel.protocol import names
from tidegate.kernel.protocol.archives import Unsafe, safe_path

MANIFEST = "MAR-INF/MANIFEST.json"
# The built-in handlers of TorchServe that Tidegate replaces, and the packages that each needs besides torch.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "base_handler": (),
    "image_classifier": ("pillow",),
    "object_detector": ("pillow",),
    "text_classifier": (),
}


def plan_of(archive: Path, name: str | None, work: Path) -> ImportPlan:
    """Return the plan for an archive. Raise UsageError if Tidegate cannot run the model.

    ``work``: an empty folder to write into.
    """
    folder = work / "model"
    home = folder / scripts.ARTIFACT
    unpack(archive, home)
    manifest = _manifest(archive, home)
    model = manifest["model"]
    found = name or names.fitting(str(model.get("modelName") or archive.stem)) or "model"
    plan = ImportPlan(str(archive), folder, found, "python")
    plan.metadata = {
        "tags": {"imported": "torchserve", "torchserve.version": str(model.get("modelVersion", ""))}
    }
    module, function, extra = _handler(plan, home, str(model.get("handler") or ""))
    facts = {"name": found, "manifest": manifest, "module": module, "function": function}
    scripts.write(folder, "torchserve", facts)
    for key in ("serializedFile", "modelFile"):
        if model.get(key):
            if not _inside(home, model[key]).is_file():
                raise UsageError(
                    f"The archive {archive} lacks the file {model[key]!s:.80}, which its manifest names. "
                    "Make the archive again with torch-model-archiver."
                )
            plan.map(f"{key} {model[key]}", "loaded by the handler")
    plan.map(
        "the body and its Content-Type", "inputs body, content_type; /predictions/NAME passes them through"
    )
    code = scripts.python_files(home)
    needs_torch = module.startswith("ts.") or any(b"ts.torch_handler" in path.read_bytes() for path in code)
    listed = _inside(home, model.get("requirementsFile") or "requirements.txt")
    scripts.map_requirements(plan, listed, code, extra=(*(("torch",) if needs_torch else ()), *extra))
    _leave(plan, model, home)
    return plan


def _manifest(archive: Path, home: Path) -> dict[str, Any]:
    try:
        found = json.loads((home / MANIFEST).read_bytes())
        if not isinstance(found["model"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(
            f"{archive} has no readable {MANIFEST}, so it is not an archive of torch-model-archiver. "
            "Name a .mar file."
        ) from None
    return dict(found)


def _handler(plan: ImportPlan, home: Path, stated: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the handler's module, its function or class, and the packages that the handler needs."""
    file, _, function = stated.partition(":")
    if file in BUILT_IN:
        plan.map(f"handler {file}", f"the same steps, in {file}.py without TorchServe")
        return f"ts.torch_handler.{file}", "", BUILT_IN[file]
    path = _inside(home, file if file.endswith(".py") else f"{file}.py")
    if not path.is_file():
        raise UsageError(
            f"The handler {stated[:80]!r} is neither a file of the archive nor one of {', '.join(BUILT_IN)}. "
            "Write the handler as a file, and archive it again with --handler FILE.py."
        )
    plan.map(f"handler {stated}", "called once for each request, with a list of this one request")
    base = path.read_text(errors="replace")
    used = tuple(package for name, packages in BUILT_IN.items() if name in base for package in packages)
    return path.stem, function, tuple(dict.fromkeys(used + (("pillow",) if "vision_handler" in base else ())))


def _inside(home: Path, name: Any) -> Path:
    """Return the path of a file that the manifest names.

    Raise UsageError if the path is outside of the archive.
    """
    try:
        return home / safe_path(str(name))
    except Unsafe:
        raise UsageError(
            f"The manifest names {str(name)[:80]!r}, which is no path in the archive. Make the archive "
            "again with torch-model-archiver."
        ) from None


def _leave(plan: ImportPlan, model: dict[str, Any], home: Path) -> None:
    if model.get("configFile") or (home / "model-config.yaml").exists():
        plan.leave(
            "model-config.yaml",
            "set these options in Tidegate: tidegate deploy --instances, --max-batch",
        )
    plan.leave(
        "batches", "the handler gets one request at a time; --instances N runs N handlers at the same time"
    )
    plan.leave(
        "/explanations and metrics of the handler", "Tidegate has its own metrics, and no /explanations"
    )
