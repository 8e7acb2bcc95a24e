"""Which Triton backend runs which artifact format."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import Format, Version

_REMEDIES = {"torch": "run `make torch` on this host, "}


@dataclass(frozen=True)
class Serving:
    """How an artifact is served: the backend, the file's name there, and our runtime if one is needed."""

    backend: str
    file: str
    runtime: str | None = None


def choose(artifact_format: Format, backends: frozenset[str], has_module: Callable[[str], bool]) -> Serving:
    """The way to serve a single-file artifact, by what this Triton has.

    ``has_module`` says whether the models' Python can import a module. The native backend is preferred;
    our Python runtimes need only Triton's Python backend. Raises ModelFailed, with the remedy, if nothing
    fits.
    """
    if artifact_format == "onnx" and "onnxruntime" in backends:
        return Serving("onnxruntime", "model.onnx")
    if artifact_format == "torchscript" and "pytorch" in backends:
        return Serving("pytorch", "model.pt")
    if "python" not in backends:
        raise ModelFailed(f"This Triton has no Python backend, which serving {artifact_format} needs here.")
    if artifact_format == "onnx":
        return _with_runtime("onnx", "model.onnx", "onnxruntime", has_module)
    if artifact_format == "sklearn":
        return _with_runtime("sklearn", "model.joblib", "sklearn", has_module)
    if artifact_format == "torchscript":
        return _with_runtime("torchscript", "model.pt", "torch", has_module)
    if artifact_format == "python":
        return Serving("python", "model.py")
    raise ModelFailed(f"The format {artifact_format!r} is a whole model folder, not a single file.")


_STAND_INS: dict[str, Format] = {"onnxruntime": "onnx", "pytorch": "torchscript"}
_BY_FILE = {"model.py": "python", "model.onnx": "onnxruntime", "model.pt": "pytorch"}


def backend_by_files(files: Collection[str]) -> str | None:
    """The backend that a version folder's files ask for, where no configuration says it.

    Python first: a model.py often lies beside a file of weights that it loads.
    """
    return next((backend for name, backend in _BY_FILE.items() if name in files), None)


def stand_in(
    backend: str | None, backends: frozenset[str], has_module: Callable[[str], bool]
) -> Serving | None:
    """Our runtime for a backend that this Triton lacks; None: it has the backend, or there is no runtime.

    Raises ModelFailed, with the remedy, if the runtime's library is missing.
    """
    if backend is None or backend in backends or backend not in _STAND_INS:
        return None
    return choose(_STAND_INS[backend], backends, has_module)


def _with_runtime(runtime: str, file: str, module: str, has_module: Callable[[str], bool]) -> Serving:
    if not has_module(module):
        package = {"sklearn": "scikit-learn"}.get(module, module)
        raise ModelFailed(
            f"Serving {runtime} needs the Python package {package!r} in the models' environment, and it is "
            f"not there: {_REMEDIES.get(module, '')}deploy the model with a requirements file that names it "
            "(`--requirements FILE`), or use a Triton with the native backend."
        )
    return Serving("python", file, runtime)


def config_is_complete(version: Version) -> bool:
    """Whether the configuration we write needs nothing from the model itself.

    Then Triton need not ask the model at load, which for a Python model saves one start of an interpreter.
    """
    return version.format != "triton" and version.signature is not None
