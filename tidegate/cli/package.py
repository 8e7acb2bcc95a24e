"""Prepare a model for upload: a file as it is, a folder as an archive.

The archive depends only on names and contents, so the same folder always gives the same SHA-256.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tidegate.cli import hugging_face_packages, llm_packages, onnx_packages
from tidegate.cli.exit_codes import UsageError

CHUNK = 1024 * 1024
SKIPPED = {"__pycache__", ".git", ".DS_Store", ".ipynb_checkpoints"}


@dataclass(frozen=True, slots=True)
class Package:
    """Bytes to upload. ``format``: None if the registry derives the format from the file's name."""

    file: BinaryIO
    filename: str
    size: int
    sha256: str
    format: str | None = None

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes, from the start."""
        self.file.seek(0)
        while chunk := self.file.read(CHUNK):
            yield chunk


@contextmanager
def packed(path: Path, adapters: Mapping[str, Path] | None = None) -> Iterator[Package]:
    """Yield the package of a file or folder. Raise UsageError if there is nothing to pack.

    ``adapters``: the LoRA adapters to pack with a language model, by name.
    """
    if adapters or (path.is_dir() and format_of(path) == "llm"):
        with llm_packages.packed(path, adapters or {}) as (archive, name):
            yield _package(archive, name, "llm")
        return
    if path.is_dir() and hugging_face_packages.task_of(path) is not None:
        files = hugging_face_packages.files_of(path)
        with llm_packages.uncompressed(dict(sorted(files.items()))) as archive:
            yield _package(archive, f"{path.resolve().name}.tar", "huggingface")
        return
    if not (path / "MLmodel").exists() and (model := onnx_packages.model_in(path)) is not None:
        with llm_packages.uncompressed(onnx_packages.files_of(model)) as archive:
            yield _package(archive, f"{model.name}.tar", "onnx")
        return
    if path.is_dir():
        with tempfile.TemporaryFile() as archive:
            pack(path, archive)
            yield _package(archive, f"{path.resolve().name}.tar.gz", format_of(path))
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
    with file:
        yield _package(file, path.name, "llm" if llm_packages.is_gguf(path) else None)


def format_of(folder: Path) -> str:
    """Return the format of a folder by the files in it.

    The first format that fits is returned:

    - "mlflow": the folder has ``MLmodel``.
    - "huggingface": a Hugging Face folder of a model that classifies or embeds.
    - "llm": a Hugging Face folder of a language model, or GGUF files.
    - "onnx": a single ONNX file.
    - "tensorflow": the folder has ``saved_model.pb``.
    - "python": the folder has ``model.py``, but no ``config.pbtxt`` and no numbered folders.
    - "triton": any other folder.
    """
    if (folder / "MLmodel").is_file():
        return "mlflow"
    if hugging_face_packages.task_of(folder) is not None:
        return "huggingface"
    if llm_packages.is_llm_folder(folder):
        return "llm"
    if onnx_packages.model_in(folder) is not None:
        return "onnx"
    if (folder / "saved_model.pb").is_file():
        return "tensorflow"
    versions = any(path.is_dir() and path.name.isdecimal() for path in folder.iterdir())
    own = (folder / "model.py").is_file() and not versions and not (folder / "config.pbtxt").exists()
    return "python" if own else "triton"


def pack(folder: Path, target: BinaryIO) -> None:
    """Write the folder as a deterministic tar.gz: sorted, without owners and times.

    A link to a file is packed as that file. Raise UsageError if the folder is empty, or if it contains a link
    to a folder.
    """
    members = list(_members(folder))
    if not members:
        raise UsageError(f"{folder} has no files.")
    # Set mtime 0 and no name, so that the gzip header is the same for the same folder.
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=target, mtime=0, compresslevel=6) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for member in members:
            _add(tar, folder, member)


def _members(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in folders:
            if (Path(root) / name).is_symlink():
                raise UsageError(f"{Path(root) / name} is a link to a folder. Replace it with that folder.")
        yield from (Path(root) / name for name in sorted(files) if name not in SKIPPED)


def _add(tar: tarfile.TarFile, folder: Path, path: Path) -> None:
    info = tarfile.TarInfo(path.relative_to(folder).as_posix())
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            info.size = found.st_size
            info.mode = 0o755 if found.st_mode & 0o100 else 0o644
            tar.addfile(info, file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None


def _package(file: BinaryIO, filename: str, kind: str | None = None) -> Package:
    digest, size = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return Package(file, filename, size, digest.hexdigest(), kind)
