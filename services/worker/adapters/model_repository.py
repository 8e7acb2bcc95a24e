"""Write the model repository: the folder from which Triton loads a version."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from services.worker.adapters import llm_repository, packed_models
from services.worker.adapters.archives import unpack
from services.worker.adapters.packed_models import is_packed_model
from services.worker.adapters.python_functions import adopt
from services.worker.adapters.triton_install import TritonInstall
from services.worker.domain import devices, formats, model_config
from services.worker.domain.devices import GpuNumbers
from tidegate.kernel.archives import is_archive, is_packed
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import DeploymentSpec, Version

RUNTIMES = Path(__file__).parents[1] / "runtimes"
CONFIG = "config.pbtxt"
UPSTREAM_PLAN = "tidegate_upstream.json"
# Triton imports this module before it loads a Python model. `runtimes/output.py` explains its contents.
UTILS = "triton_python_backend_utils.py"
# The default of TIDEGATE_MAX_FETCHED_BYTES.
ANSWER_BYTES = 512 * 2**20


def prepare(
    version: Version,
    deployment: DeploymentSpec,
    artifact: Path,
    repository: Path,
    install: TritonInstall,
    gpus: GpuNumbers = (),
    *,
    symlinks: bool = True,
    answer_bytes: int = ANSWER_BYTES,
) -> list[str]:
    """Replace the contents of ``repository`` with this version. Return its models in loading order.

    This function blocks. The requests go to the last model. This model calls the other models, as an ensemble
    or from Python. ``gpus``: the GPUs for the model; empty to run it on the CPU. ``symlinks``: False if the
    model's process cannot follow links into the cache. ``answer_bytes``: the most bytes of an upstream's
    answer. Raises ModelFailed, with the remedy, if this worker cannot serve the version.
    """
    # Empty the folder, but do not remove it: a Triton in a sandbox has mounted this folder, and would not see
    # a new one.
    repository.mkdir(parents=True, exist_ok=True)
    for left in repository.iterdir():
        shutil.rmtree(left)
    if version.format == "triton":
        models = _prepare_archive(version, deployment, artifact, repository, install, gpus)
    elif version.format == "llm":
        models = _prepare_llm(version, deployment, artifact, repository, install, gpus, symlinks=symlinks)
    else:
        models = _prepare_file(version, deployment, artifact, repository, install, gpus, symlinks=symlinks)
        if version.format == "oip":
            _add_upstream(deployment, repository / version.model / "1", answer_bytes)
    for code in repository.glob("*/*/model.py"):
        if not code.with_name(UTILS).exists():
            shutil.copyfile(RUNTIMES / "output.py", code.with_name(UTILS))
    _open_to_models(repository)
    return models


def _prepare_file(
    version: Version,
    deployment: DeploymentSpec,
    artifact: Path,
    repository: Path,
    install: TritonInstall,
    gpus: GpuNumbers,
    *,
    symlinks: bool,
) -> list[str]:
    gpus = devices.usable_gpus(version.format, gpus, allow_cpu=deployment.resources.allow_cpu)
    serving = formats.choose(version.format, install.backends(), install.has_module)
    folder = repository / version.model / "1"
    folder.parent.mkdir(parents=True)
    file = None
    if is_packed_model(version.format):
        file = packed_models.prepare(version, artifact, folder)
    elif version.format == "python" and is_packed(artifact):
        unpack(artifact, folder)
    elif version.format == "tensorflow":
        unpack(artifact, folder / serving.file)
    elif version.format == "onnx" and is_archive(artifact):
        unpack(artifact, folder)
        _rename_onnx(folder, serving.file)
    else:
        folder.mkdir()
        place(artifact, folder / serving.file, symlinks=symlinks)
    if serving.runtime is not None:
        _add_runtime(serving.runtime, folder)
    if version.format == "python":
        file = adopt(folder, version)
    text = model_config.build(
        version, deployment, model=version.model, backend=serving.backend, gpus=gpus, file=file
    )
    (folder.parent / CONFIG).write_text(text)
    return [version.model]


def _prepare_llm(
    version: Version,
    deployment: DeploymentSpec,
    artifact: Path,
    repository: Path,
    install: TritonInstall,
    gpus: GpuNumbers,
    *,
    symlinks: bool,
) -> list[str]:
    formats.choose(version.format, install.backends(), install.has_module)
    folder = repository / version.model
    put = partial(place, symlinks=symlinks)
    engine = install.engine_python
    text = llm_repository.prepare(version, deployment, artifact, folder, gpus, put, engine)
    (folder / CONFIG).write_text(text)
    return [version.model]


def _rename_onnx(folder: Path, name: str) -> None:
    """Rename the ONNX file of an archive to the name that its backend expects.

    Other files keep their names. They contain the model's external data, and the ONNX file refers to them by
    name.
    """
    found = [path for path in folder.iterdir() if path.suffix.lower() == ".onnx" and path.is_file()]
    if len(found) != 1:
        raise ModelFailed(
            f"The archive of an ONNX model needs exactly one .onnx file at its root, but has {len(found)}. "
            "Pack the file together with its external data, and deploy it again."
        )
    found[0].rename(folder / name)


def cache_mb(
    repository: Path, models: Sequence[str], deployment: DeploymentSpec, install: TritonInstall
) -> int:
    """Return the size of the response cache in MiB; 0 if no model enables the cache.

    Raises ModelFailed if a model enables the cache, but this Triton has no cache. Without this error, Triton
    would silently ignore the setting.
    """
    asking = [model for model in models if model_config.wants_cache(_text(repository / model))]
    if not asking:
        return 0
    if not install.has_cache():
        raise ModelFailed(
            f"The config.pbtxt of {asking[0]!r} enables response_cache, but this Triton has no cache `local` "
            f"in {install.caches_dir}. Remove response_cache, or set TIDEGATE_TRITON_SERVER to a Triton with "
            "this cache."
        )
    return deployment.resources.response_cache_mb


def place(artifact: Path, target: Path, *, symlinks: bool = True) -> None:
    """Put a cached file where Triton looks for it, as a hard link.

    If that is not possible, make a symlink, or a copy if ``symlinks`` is False.
    """
    try:
        os.link(artifact, target)
    except OSError:
        if symlinks:
            target.symlink_to(artifact.absolute())
        else:
            shutil.copyfile(artifact, target)


def _open_to_models(repository: Path) -> None:
    """Make the files in the repository readable for every user, independent of this process's umask."""
    for path in repository.rglob("*"):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            path.chmod(0o755)
        # The mode of a hard link to a cached artifact must not change, because the artifact shares it.
        elif stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            path.chmod(0o644)


def _prepare_archive(
    version: Version,
    deployment: DeploymentSpec,
    artifact: Path,
    repository: Path,
    install: TritonInstall,
    gpus: GpuNumbers,
) -> list[str]:
    unpacked = repository.with_name(repository.name + ".unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpack(artifact, unpacked)
    try:
        folders = model_folders(unpacked, version.model)
        configs = {name: _text(folder) for name, folder in folders.items()}
        served = model_config.served_model(configs, version.model)
        for name, folder in folders.items():
            shutil.move(folder, repository / name)
            _adopt(repository / name, configs[name], deployment, install, gpus)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return model_config.load_order(configs, served)


def model_folders(root: Path, fallback_name: str) -> dict[str, Path]:
    """Return the folder of each Triton model, by the model's name; empty if there is none.

    ``root``: the folder of a model, or a folder of models. It may also be wrapped in up to 7 other folders.
    """
    for _ in range(8):
        if _is_model(root):
            name = model_config.top_level(_text(root)).get("name") or fallback_name
            if "/" in name or name.startswith("."):
                raise ModelFailed(
                    f"The {CONFIG} has the name {name!r}, which cannot be the name of a folder. Change or "
                    "remove the field `name`."
                )
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
        raise ModelFailed(f"The {CONFIG} of {folder.name!r} is not UTF-8 text. Save it as UTF-8.") from None


def _adopt(
    folder: Path, text: str, deployment: DeploymentSpec, install: TritonInstall, gpus: GpuNumbers
) -> None:
    """Change a model in the repository so that this Triton can load it."""
    if model_config.is_ensemble(text):
        (folder / CONFIG).write_text(model_config.adapt(text, deployment, model=folder.name, backend=None))
        # Triton needs the empty version folder of an ensemble, and some archivers drop empty folders.
        (folder / "1").mkdir(exist_ok=True)
        return
    devices.check_instance_groups(
        folder.name, devices.instance_groups(text), devices.replica_gpus(deployment.resources)
    )
    versions = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    files = {path.name for version in versions for path in version.iterdir()}
    backend = model_config.backend_of(text) or formats.backend_by_files(files)
    serving = formats.stand_in(backend, install.backends(), install.has_module)
    if serving is None:
        _check_backend(folder.name, backend, install.backends())
    else:
        named = model_config.top_level(text).get("default_model_filename")
        for version in versions:
            if named and (version / named).exists():
                (version / named).rename(version / serving.file)
            _add_runtime(str(serving.runtime), version)
    adapted = model_config.adapt(
        text, deployment, model=folder.name, backend=backend, stand_in=serving is not None, gpus=gpus
    )
    (folder / CONFIG).write_text(adapted)


def _add_runtime(runtime: str, folder: Path) -> None:
    for source in (RUNTIMES / "rows.py", *(RUNTIMES / runtime).glob("*.py")):
        shutil.copyfile(source, folder / source.name)


def _add_upstream(deployment: DeploymentSpec, folder: Path, answer_bytes: int) -> None:
    if deployment.upstream is None:
        raise ModelFailed(
            f"The Deployment {deployment.name} has no upstream, but the version needs one. Deploy the "
            "version with --upstream https://HOST/v2/models/NAME."
        )
    plan = deployment.upstream.model_dump(mode="json", exclude={"credential"})
    (folder / UPSTREAM_PLAN).write_text(json.dumps(plan | {"answer_bytes": answer_bytes}))
    shutil.copyfile(RUNTIMES / "llm" / "breaker.py", folder / "breaker.py")


def _check_backend(model: str, backend_needed: str | None, backends: frozenset[str]) -> None:
    if backend_needed is not None and backend_needed not in backends:
        raise ModelFailed(
            f"The model {model!r} needs the backend {backend_needed!r}, but this Triton has only "
            f"{', '.join(sorted(backends))}. Use workers with NVIDIA's Triton image, or set "
            "TIDEGATE_TRITON_SERVER to a Triton with this backend."
        )
