"""Which format a file is of, and what has to be said before it is taken."""

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
}


def chosen(filename: str, given: Format | None) -> Format:
    """The format that was given, or else what the file's name says; BadRequest when it says nothing."""
    if given is not None:
        return given
    lower = filename.lower()
    for suffix, found in _SUFFIXES.items():
        if lower.endswith(suffix):
            return found
    raise BadRequest(
        f"The name {filename[:80]!r} does not say which format it is: give --model-format (in the API: "
        "format) as onnx, sklearn, torchscript, python or triton, or let the name end in one of "
        f"{', '.join(_SUFFIXES)}."
    )


def check_filename(filename: str) -> str:
    """``filename`` itself when it is a plain file name; raises BadRequest."""
    plain = filename.isprintable() and not set(filename) & {"/", "\\"} and filename not in {".", ".."}
    if plain and 0 < len(filename) <= 255:
        return filename
    raise BadRequest(f"{filename[:80]!r} is not a plain file name (1 to 255 characters, no folders).")


def check_consent(found: Format, *, allow_pickle: bool) -> None:
    """Refuse a pickle unless the publisher said in so many words that it may run."""
    if found == "sklearn" and not allow_pickle:
        raise BadRequest(
            "A scikit-learn joblib file is a pickle: loading it runs whatever code is in it, on the "
            "workers. If you trust where it comes from, say so with allow_pickle=true "
            "(`tidegate deploy --allow-pickle`); exporting the model to ONNX avoids the question."
        )
