"""Guess a format from a file name, and check that a pickle is allowed."""

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
    ".pt2": "pt2",
    ".py": "python",
    ".zip": "triton",
    ".tar": "triton",
    ".tar.gz": "triton",
    ".tgz": "triton",
    ".json": "xgboost",
    ".ubj": "xgboost",
    ".xgb": "xgboost",
    ".txt": "lightgbm",
    ".lgb": "lightgbm",
    ".cbm": "catboost",
    ".skops": "sklearn",
    ".tflite": "tflite",
    ".gguf": "llm",
    ".gguf.tar": "llm",
}


def format_by_name(filename: str) -> Format | None:
    """Return the format that a file name suggests, or None.

    This is only a hint: ``recognition.py`` decides by the contents.
    """
    lower = filename.lower()
    found = [suffix for suffix in _SUFFIXES if lower.endswith(suffix)]
    return _SUFFIXES[max(found, key=len)] if found else None


def check_filename(filename: str) -> str:
    """Return ``filename``. Raise BadRequest unless it is a plain file name."""
    plain = filename.isprintable() and not set(filename) & {"/", "\\"} and filename not in {".", ".."}
    if plain and 0 < len(filename) <= 255:
        return filename
    raise BadRequest(f"{filename[:80]!r} is not a plain file name (1 to 255 characters, no folders).")


def check_pickle_allowed(format_: Format | None, *, allow_pickle: bool) -> None:
    """Raise BadRequest for a pickle if ``allow_pickle`` is False. Loading a pickle can run any code."""
    if format_ == "sklearn" and not allow_pickle:
        raise BadRequest(
            "A joblib file of scikit-learn is a pickle. Loading a pickle can run any code on the workers. "
            "If you trust the author of this file, deploy with `tidegate deploy --allow-pickle` (in the "
            "API: allow_pickle=true). A model that is exported to ONNX needs no such permission."
        )
