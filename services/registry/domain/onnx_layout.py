"""Check the files in an archive of an ONNX model. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from tidegate.kernel.errors import BadRequest

# The largest size of a protobuf message, in bytes. An ONNX file is one message; its external data does not
# count.
MAX_MODEL_BYTES = 2 * 1024**3
# Extensions of forbidden files. Python would import such files from the model's folder, or Triton would read
# them.
_CODE = frozenset({".py", ".pyc", ".pyd", ".pth", ".so", ".pbtxt"})


def model_of(sizes: Mapping[PurePosixPath, int]) -> PurePosixPath:
    """Return the ONNX file at the root of an archive.

    Raise BadRequest if there is not exactly one, if it is too large, or if the archive contains code.
    """
    models = [path for path in sizes if path.suffix.lower() == ".onnx" and len(path.parts) == 1]
    if len(models) != 1:
        names = ", ".join(sorted(map(str, sizes)))[:200]
        raise BadRequest(
            "An archive of an ONNX model needs exactly one .onnx file at its root, with its external data "
            f"beside it. This archive has {names}."
        )
    if sizes[models[0]] > MAX_MODEL_BYTES:
        raise BadRequest(
            f"The ONNX file {str(models[0])!r} is larger than {MAX_MODEL_BYTES} bytes, protobuf's limit. "
            "Export the model with its weights as external data."
        )
    code = [str(path) for path in sizes if _is_code(path)]
    if code:
        raise BadRequest(
            f"An archive of an ONNX model must not have code, but it has {', '.join(sorted(code))[:200]}. "
            "Deploy code as a Python model or a Triton model directory."
        )
    return models[0]


def _is_code(path: PurePosixPath) -> bool:
    return bool(_CODE & {suffix.lower() for suffix in path.suffixes}) or "__pycache__" in path.parts
