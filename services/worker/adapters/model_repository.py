"""Writes the folder that Triton loads a version from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from services.worker.adapters.archives import unpack
from services.worker.adapters.triton_install import TritonInstall
from services.worker.domain import formats, model_config
from tidegate.errors import ModelFailed
from tidegate.protocol.models import DeploymentSpec, Version

RUNTIMES = Path(__file__).parents[1] / "runtimes"
CONFIG = "config.pbtxt"


def prepare(
    version: Version, deployment: DeploymentSpec, artifact: Path, repository: Path, install: TritonInstall
) -> list[str]:
    """Make ``repository`` hold exactly this version and give the names of the models to load, in order.

    The last one serves; those before it are its parts (of an ensemble, or called from Python). Blocking
    (disk). Raises ModelFailed, with the remedy, when it cannot be served here.
    """
    if repository.exists():
        shutil.rmtree(repository)
    if version.format == "triton":
        return _prepare_archive(version, deployment, artifact, repository, install)
    serving = formats.choose(version.format, install.backends(), install.has_module)
    folder = repository / version.model / "1"
    folder.mkdir(parents=True)
    place(artifact, folder / serving.file)
    if serving.runtime is not None:
        shutil.copyfile(RUNTIMES / serving.runtime / "model.py", folder / "model.py")
        shutil.copyfile(RUNTIMES / "rows.py", folder / "rows.py")
    text = model_config.build(version, deployment, model=version.model, backend=serving.backend)
    (folder.parent / CONFIG).write_text(text)
    return [version.model]


def place(artifact: Path, target: Path) -> None:
    """Put a cached file where Triton looks for it, without a copy where the file system allows it."""
    try:
        os.link(artifact, target)
    except OSError:
        target.symlink_to(artifact.absolute())


def _prepare_archive(
    version: Version, deployment: DeploymentSpec, artifact: Path, repository: Path, install: TritonInstall
) -> list[str]:
    unpacked = repository.with_name(repository.name + ".unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpack(artifact, unpacked)
    try:
        folders = model_folders(unpacked, version.model)
        repository.mkdir(parents=True)
        configs = {name: _adopt(folder, repository / name, deployment) for name, folder in folders.items()}
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    _check_backends(configs, install.backends())
    served = model_config.served_model(configs, version.model)
    return [*sorted(configs.keys() - {served}), served]


def model_folders(root: Path, fallback_name: str) -> dict[str, Path]:
    """The Triton models by name: ``root`` is one, or holds them, or wraps such a folder (several times)."""
    for _ in range(8):
        if _is_model(root):
            name = model_config.top_level(_text(root)).get("name") or fallback_name
            if "/" in name or name.startswith("."):
                raise ModelFailed(f"The configuration's name {name!r} cannot be the name of a folder.")
            return {name: root}
        inner = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
        if found := {path.name: path for path in inner if _is_model(path)}:
            return found
        if len(inner) != 1:
            break
        root = inner[0]
    return {}


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or any(
        path.is_dir() and path.name.isdigit() for path in folder.iterdir()
    )


def _text(folder: Path) -> str:
    config = folder / CONFIG
    try:
        return config.read_text() if config.is_file() else ""
    except UnicodeDecodeError:
        raise ModelFailed(f"The {CONFIG} of {folder.name!r} is not a text.") from None


def _adopt(folder: Path, target: Path, deployment: DeploymentSpec) -> str:
    """Move a model into the repository; its configuration text, '' if it has none."""
    text = _text(folder)
    shutil.move(folder, target)
    if text:
        instances = 1 if model_config.is_ensemble(text) else deployment.instances
        (target / CONFIG).write_text(model_config.adapt(text, model=target.name, instances=instances))
    if model_config.is_ensemble(text):
        # Archivers drop empty folders, and Triton wants the version folder of an ensemble too.
        (target / "1").mkdir(exist_ok=True)
    return text


def _check_backends(configs: dict[str, str], backends: frozenset[str]) -> None:
    for name, text in configs.items():
        wanted = model_config.backend_of(text)
        if wanted is not None and wanted not in backends:
            raise ModelFailed(
                f"The model {name!r} wants the backend {wanted!r}, and this Triton has only "
                f"{', '.join(sorted(backends))}. Use workers with NVIDIA's Triton image, set "
                "TIDEGATE_TRITON_SERVER to such a server, or deploy the model file itself (.onnx, .pt): "
                "that needs no native backend."
            )
