"""Check the files in an archive of an ONNX model. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from tidegate.kernel.errors import BadRequest

# The limit of protobuf, and so of an ONNX file without its external data.
LARGEST = 2 * 1024**3
# What Python would import, or Triton read, from the folder that the model is loaded from.
_CODE = frozenset({".py", ".pyc", ".pyd", ".pth", ".so", ".pbtxt"})


def model_of(sizes: Mapping[PurePosixPath, int]) -> PurePosixPath:
    """Return the only ONNX file at the root of an archive. Raise BadRequest for any other, and for code."""
    found = [path for path in sizes if path.suffix.lower() == ".onnx" and len(path.parts) == 1]
    if len(found) != 1:
        names = ", ".join(sorted(map(str, sizes)))[:200]
        raise BadRequest(
            "The archive of an ONNX model needs exactly one .onnx file at its root, with its external data "
            f"beside it; it holds {names}."
        )
    if sizes[found[0]] > LARGEST:
        raise BadRequest(f"The ONNX file {str(found[0])!r} is larger than {LARGEST} bytes, protobuf's limit.")
    code = [str(path) for path in sizes if _is_code(path)]
    if code:
        raise BadRequest(
            f"The archive of an ONNX model may not hold {', '.join(sorted(code))[:200]}: code is served as a "
            "Python model or a Triton model directory."
        )
    return found[0]


def _is_code(path: PurePosixPath) -> bool:
    return bool(_CODE & {suffix.lower() for suffix in path.suffixes}) or "__pycache__" in path.parts
