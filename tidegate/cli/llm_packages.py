"""Pack a language model and its adapters as one tar, from a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tidegate.cli import hugging_face_packages
from tidegate.cli.exit_codes import UsageError

MAGIC = b"GGUF"
ADAPTERS = "adapters"
_SKIPPED = {"__pycache__", ".git", ".DS_Store", ".cache", ".gitattributes"}
# File extensions of weights in other formats than safetensors. If a folder has safetensors, no engine reads
# files in these formats, so they are not packed.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".tflite")


def is_gguf(path: Path) -> bool:
    """Return True if a file begins with the magic bytes of a GGUF file."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def is_llm_folder(folder: Path) -> bool:
    """Return True for a Hugging Face folder of a language model, or a folder with GGUF files."""
    if (folder / "config.pbtxt").exists() or (folder / "model.py").exists():
        return False
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if _has_gguf(folder):
        return True
    if hugging_face_packages.task_of(folder) is not None:
        return False
    tokenizer = any(name.startswith(("tokenizer", "vocab", "spiece", "tekken")) for name in names)
    return "config.json" in names and tokenizer


def is_hugging_face(folder: Path) -> bool:
    """Return True for a Hugging Face folder of a language model. Only vLLM reads such a folder."""
    return folder.is_dir() and not _has_gguf(folder) and is_llm_folder(folder)


def _has_gguf(folder: Path) -> bool:
    return any(path.name.lower().endswith(".gguf") for path in folder.iterdir() if path.is_file())


def adapter_path(name: str, source: Path) -> str:
    """Return the path of an adapter in the archive."""
    return f"{ADAPTERS}/{name}{'' if source.is_dir() else source.suffix}"


@contextmanager
def packed(path: Path, adapters: Mapping[str, Path]) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a tar of a model and its adapters, and the tar's name. Equal files make equal tars.

    The tar is not compressed: compression takes minutes for gigabytes, and weights hardly become smaller.
    Raise UsageError if a file is missing or cannot be read.
    """
    files = files_of(path) if path.is_dir() else {path.name: path}
    if not files:
        raise UsageError(f"{path} has no files. Name a GGUF file or a Hugging Face folder.")
    for name, source in adapters.items():
        if not source.exists():
            raise UsageError(f"--adapter {name}={source}: this file or folder does not exist.")
        inside = adapter_path(name, source)
        found = files_of(source) if source.is_dir() else {"": source}
        files |= {f"{inside}/{each}".rstrip("/"): where for each, where in found.items()}
    gguf = any("/" not in name and name.lower().endswith(".gguf") for name in files) or is_gguf(path)
    with uncompressed(dict(sorted(files.items()))) as archive:
        yield archive, f"{_stem(path)}{'.gguf' if gguf else ''}.tar"


@contextmanager
def uncompressed(files: Mapping[str, Path]) -> Iterator[BinaryIO]:
    """Yield a tar of ``files``. Equal files in the same order make equal tars.

    ``files``: for each name in the tar, the file on this machine. The tar has the same order. Raise
    UsageError for a file that cannot be read.
    """
    with tempfile.TemporaryFile() as archive:
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, path in files.items():
                _add(tar, path, name)
        yield archive


def _stem(path: Path) -> str:
    resolved = path.resolve()
    return resolved.name if resolved.is_dir() else resolved.stem


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files to pack from a folder, by their path in the folder."""
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not _SKIPPED & set(path.relative_to(folder).parts)
    }
    if any(name.endswith(".safetensors") for name in found):
        found = {name: path for name, path in found.items() if not name.endswith(_OTHER_WEIGHTS)}
    return found


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.mode = 0o644
    try:
        info.size = path.stat().st_size
        with path.open("rb") as file:
            tar.addfile(info, file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
