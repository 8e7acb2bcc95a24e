"""Pack an ONNX model and the other files that hold its weights (external data) as one tar."""

from __future__ import annotations

import mmap
from pathlib import Path, PurePosixPath

from tidegate.cli.exit_codes import UsageError
from tidegate.kernel.protocol import onnx_external
from tidegate.kernel.protocol.archives import Unsafe, safe_path
from tidegate.kernel.protocol.protobuf_wire import Budget, Malformed, Message


def model_in(path: Path) -> Path | None:
    """Return the ONNX file that must be packed as a tar; None if there is none.

    A file is returned if it is an ONNX file with external data. For a folder, its only ONNX file is returned.
    The result is None for a folder that has several ONNX files or contains another kind of model.
    """
    if not path.is_dir():
        return path if path.suffix.lower() == ".onnx" and path.is_file() and external_files(path) else None
    files = [each for each in path.iterdir() if each.suffix.lower() == ".onnx" and each.is_file()]
    other = any(each.is_dir() and each.name.isdecimal() for each in path.iterdir())
    other = other or any((path / name).exists() for name in ("config.pbtxt", "model.py"))
    return files[0] if len(files) == 1 and not other else None


def external_files(model: Path) -> list[str]:
    """Return the paths of an ONNX file's external data, relative to the folder of the ONNX file.

    Raise UsageError for a path outside of this folder, a hidden file or a missing file. Return an empty list
    for a file that is not ONNX, because the registry reports this error.
    """
    try:
        if not model.stat().st_size:
            return []
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = {each.location for each in onnx_external.externals(Message(data, 0, len(data), Budget()))}
    except OSError as error:
        raise UsageError(f"{model}: {error.strerror}.") from None
    except Malformed:
        return []
    return sorted({str(_inside(model, location)) for location in found})


def _inside(model: Path, location: str) -> PurePosixPath:
    try:
        path = safe_path(location)
    except Unsafe:
        raise UsageError(
            f"{model} keeps weights in {location[:80]!r}, which is not below its folder. Save it again with "
            "onnx.save(model, path, save_as_external_data=True, location='weights.data')."
        ) from None
    if any(step.startswith(".") for step in path.parts):
        # If the model is in the user's home folder, it could name a private key such as .ssh/id_ed25519 as
        # its weights. The key would be uploaded, so hidden files are refused.
        raise UsageError(
            f"{model} names {location[:80]!r} as a file of weights, but hidden files are "
            "not uploaded. If this file really has weights, save the model again with another location."
        )
    if not (model.parent / path).is_file():
        raise UsageError(
            f"{model} keeps weights in {location[:80]!r}, which is missing. Copy this file to its place."
        )
    return path


def files_of(model: Path) -> dict[str, Path]:
    """Return the files to pack, by their path in the archive: the model and its external data."""
    return {name: model.parent / name for name in (model.name, *external_files(model))}
