"""The format of a model file, and the permission that a pickle needs."""

from __future__ import annotations

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Format

_SUFFIXES: dict[str, Format] = {
    ".onnx": "onnx",
    ".joblib": "sklearn",
    ".pkl": "sklearn",
    ".pickle": "sklearn",
    ".pt": "torchscript",
    ".pth": "torchscript",
    ".ts": "torchscript",
    ".py": "python",
    ".zip": "triton",
    ".tar": "triton",
    ".tar.gz": "triton",
    ".tgz": "triton",
    ".gguf": "llm",
    ".gguf.tar": "llm",
}


def format_of(filename: str, stated_format: Format | None) -> Format:
    """Return ``stated_format``, or else the format of the file name. Raise BadRequest if it is unknown."""
    if stated_format is not None:
        return stated_format
    if (found := _by_suffix(filename)) is not None:
        return found
    raise BadRequest(
        f"The ending of {filename[:80]!r} does not say the model's format. Add --model-format (in the API: "
        "format) with onnx, sklearn, torchscript, python, triton or llm, or use a file name that ends in one "
        "of "
        f"{', '.join(_SUFFIXES)}."
    )


def is_by_content(filename: str, stated_format: Format | None) -> bool:
    """Return True if the contents may show that a file is a language model, because its name does not."""
    return stated_format is None and _by_suffix(filename) in (None, "triton")


def _by_suffix(filename: str) -> Format | None:
    lower = filename.lower()
    found = [suffix for suffix in _SUFFIXES if lower.endswith(suffix)]
    return _SUFFIXES[max(found, key=len)] if found else None


def check_filename(filename: str) -> str:
    """Return ``filename``. Raise BadRequest unless it is a plain file name."""
    plain = filename.isprintable() and not set(filename) & {"/", "\\"} and filename not in {".", ".."}
    if plain and 0 < len(filename) <= 255:
        return filename
    raise BadRequest(f"{filename[:80]!r} is not a plain file name (1 to 255 characters, no folders).")


def check_pickle_allowed(format_: Format, *, allow_pickle: bool) -> None:
    """Raise BadRequest for a pickle, unless its publisher has allowed it: loading it runs code."""
    if format_ == "sklearn" and not allow_pickle:
        raise BadRequest(
            "A scikit-learn joblib file is a pickle: loading it runs any code in it on the workers. "
            "If you trust its origin, deploy with `tidegate deploy --allow-pickle` (in the API: "
            "allow_pickle=true). An export to ONNX needs no such permission."
        )
