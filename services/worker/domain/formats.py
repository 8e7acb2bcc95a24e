"""Choose the Triton backend for an artifact format."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import Format, Version

_REMEDIES = {"torch": "run `make torch` on this host, or "}


# The formats that Tidegate's own runtimes can serve. Each format has the file name of its artifact, and the
# Python module that its runtime needs.
_RUNTIMES: dict[Format, tuple[str, str]] = {
    "onnx": ("model.onnx", "onnxruntime"),
    "sklearn": ("model.joblib", "sklearn"),
    "torchscript": ("model.pt", "torch"),
    "xgboost": ("model.xgb", "xgboost"),
    "lightgbm": ("model.txt", "lightgbm"),
    "catboost": ("model.cbm", "catboost"),
    "tflite": ("model.tflite", "ai_edge_litert"),
    "tensorflow": ("saved_model", "tensorflow"),
}
_NATIVE = frozenset({"onnx", "torchscript"})
_PACKAGES = {
    "sklearn": "scikit-learn", "xgboost": "xgboost-cpu", "ai_edge_litert": "ai-edge-litert",
    "tensorflow": "tensorflow-cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Serving:
    """The Triton backend that serves an artifact. ``file``: the file name that the backend expects.

    ``runtime``: the runtime of Tidegate that runs the artifact in this backend; None if none is needed.
    """

    backend: str
    file: str
    runtime: str | None = None


def choose(artifact_format: Format, backends: frozenset[str], has_module: Callable[[str], bool]) -> Serving:
    """Return how to serve a single-file artifact with this Triton.

    If this Triton has a native backend for the format, that backend serves the artifact. Otherwise a runtime
    of Tidegate serves it in the Python backend. ``has_module`` returns True if the Python that runs models
    has a module.

    Raises ModelFailed, with the remedy, if the backend or the runtime's module is missing. Raises ModelFailed
    also if an artifact of this format is a folder.
    """
    if artifact_format == "onnx" and "onnxruntime" in backends:
        return Serving("onnxruntime", "model.onnx")
    if artifact_format == "torchscript" and "pytorch" in backends:
        return Serving("pytorch", "model.pt")
    if "python" not in backends:
        raise ModelFailed(
            f"The format {artifact_format} needs Triton's Python backend here, but this Triton does not have "
            "it. Set TIDEGATE_TRITON_SERVER to a Triton with this backend."
        )
    if artifact_format in _RUNTIMES:
        return _with_runtime(artifact_format, *_RUNTIMES[artifact_format], has_module)
    if artifact_format == "pt2":
        return _with_runtime("torchscript", "model.pt2", "torch", has_module, native=False)
    if artifact_format in ("python", "mlflow", "huggingface"):
        return Serving("python", "model.py")
    if artifact_format == "llm":
        return Serving("python", "model.py", "llm")
    if artifact_format == "oip":
        return Serving("python", "upstream.json", "oip")
    raise ModelFailed(f"A model of the format {artifact_format!r} is a folder, not a single file.")


_STAND_INS: dict[str, Format] = {"onnxruntime": "onnx", "pytorch": "torchscript"}
_BY_FILE = {"model.py": "python", "model.onnx": "onnxruntime", "model.pt": "pytorch"}


def backend_by_files(files: Collection[str]) -> str | None:
    """Return the backend for a version folder with these files; None if no file name identifies it.

    The calling code must use this only if the configuration names no backend. Python is tried first, because
    a folder with a model.py often also contains its weights, such as a model.onnx.
    """
    return next((backend for name, backend in _BY_FILE.items() if name in files), None)


def stand_in(
    backend: str | None, backends: frozenset[str], has_module: Callable[[str], bool]
) -> Serving | None:
    """Return Tidegate's runtime that replaces a backend that this Triton lacks.

    Return None if Triton has the backend, or if Tidegate has no runtime for it. Raises ModelFailed, with the
    remedy, if the runtime's library is missing.
    """
    if backend is None or backend in backends or backend not in _STAND_INS:
        return None
    return choose(_STAND_INS[backend], backends, has_module)


def _with_runtime(
    runtime: str, file: str, module: str, has_module: Callable[[str], bool], *, native: bool = True
) -> Serving:
    """Return how to serve ``file`` with a runtime of Tidegate.

    Raises ModelFailed, with the remedy, if the Python that runs models lacks ``module``. ``native``: True if
    other Tritons may have a native backend for ``file``.
    """
    if not has_module(module):
        package = _PACKAGES.get(module, module)
        also = ", or use a Triton with the native backend" if native and runtime in _NATIVE else ""
        raise ModelFailed(
            f"The models' Python lacks the package {package!r}, which {file} needs. To add the package, "
            f"{_REMEDIES.get(module, '')}deploy the model with a requirements file that names it "
            f"(`--requirements FILE`){also}."
        )
    return Serving("python", file, runtime)


def config_is_complete(version: Version) -> bool:
    """Return True if the configuration that Tidegate writes is complete.

    An incomplete configuration delays the start, because Triton must load the model to complete it. For a
    Python model, Triton starts one more interpreter to do this.
    """
    return version.format != "triton" and version.signature is not None
