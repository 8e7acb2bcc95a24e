"""Read an archive with one ONNX file and its external data (files with weights)."""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath

from services.registry.adapters import archive_reader, onnx_signature
from services.registry.domain import onnx_layout
from services.registry.domain.signature import OnnxGraph
from tidegate.kernel.protocol.archives import ArchiveLimits


def read(path: Path, limits: ArchiveLimits) -> OnnxGraph:
    """Check that an archive has the ONNX file's external data. Return the file's inputs and outputs.

    Blocking: call it in a thread. Raise BadRequest if data are missing, or if the archive or the ONNX file is
    wrong.
    """
    contents = archive_reader.read_archive(path, names=(), max_text=0, limits=limits)
    model = onnx_layout.model_of(contents.sizes)
    beside = {str(file): size for file, size in contents.sizes.items() if file != model}
    with tempfile.TemporaryDirectory(prefix="tidegate-registry-") as folder:
        file = Path(folder, "model.onnx")
        archive_reader.extract(path, PurePosixPath(model), file)
        return onnx_signature.read(file, beside)
