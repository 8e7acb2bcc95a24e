"""Which Triton backend runs which artifact format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tidegate.errors import ModelFailed
from tidegate.protocol.models import Format, Version


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


def _with_runtime(runtime: str, file: str, module: str, has_module: Callable[[str], bool]) -> Serving:
    if not has_module(module):
        package = {"sklearn": "scikit-learn"}.get(module, module)
        raise ModelFailed(
            f"Serving {runtime} needs the Python package {package!r} in the models' environment, and it is "
            f"not there: run `<runtime>/model-env/bin/python3 -m pip install {package}`, or use a Triton "
            "with the native backend."
        )
    return Serving("python", file, runtime)


def config_is_complete(version: Version) -> bool:
    """Whether the configuration we write needs nothing from the model itself.

    Then Triton need not ask the model at load, which for a Python model saves one start of an interpreter.
    """
    return version.format != "triton" and version.signature is not None
