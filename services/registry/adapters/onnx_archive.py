"""An archive of one ONNX file and the files that it keeps weights in (external data)."""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath

from services.registry.adapters import archive_reader, onnx_signature
from services.registry.domain import onnx_layout
from services.registry.domain.archive_limits import ArchiveLimits
from services.registry.domain.signature import OnnxGraph


def read(path: Path, limits: ArchiveLimits) -> OnnxGraph:
    """Return the inputs and outputs of the archive's ONNX file, its external data checked against the rest.

    Blocking: call it in a thread. Raises BadRequest.
    """
    contents = archive_reader.read_archive(path, wanted=(), max_text=0, limits=limits)
    model = onnx_layout.model_of(contents.sizes)
    beside = {str(file): size for file, size in contents.sizes.items() if file != model}
    with tempfile.TemporaryDirectory(prefix="tidegate-registry-") as folder:
        file = Path(folder, "model.onnx")
        archive_reader.extract(path, PurePosixPath(model), file)
        return onnx_signature.read(file, beside)
