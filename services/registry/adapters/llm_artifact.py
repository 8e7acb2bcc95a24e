"""Recognise and check the artifact of a language model: a GGUF file, or an archive of a folder.

Also recognise a file that describes an upstream.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from services.registry.adapters import archive_reader
from services.registry.domain import llm_layout
from tidegate.kernel import archives
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import gguf
from tidegate.kernel.protocol.archives import ArchiveLimits

MAX_JSON = 32 * 1024 * 1024
MAX_UPSTREAM = 16 * 1024


def is_gguf(path: Path) -> bool:
    """Return True if a file begins with the magic bytes of a GGUF file."""
    with path.open("rb") as file:
        return file.read(len(gguf.MAGIC)) == gguf.MAGIC


def is_upstream(path: Path) -> bool:
    """Return True if a file describes an upstream, as `tidegate deploy --upstream` writes it."""
    if path.stat().st_size > MAX_UPSTREAM:
        return False
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("upstream"), str)


def check(path: Path, limits: ArchiveLimits, *, allow_pickle: bool) -> None:
    """Check the artifact of a language model. Blocking.

    Raise BadRequest if no engine can load the file. The error names the problem and the remedy.
    """
    if archives.is_archive(path):
        names = {llm_layout.CONFIG, llm_layout.INDEX}
        contents = archive_reader.read_archive(path, names=names, max_text=MAX_JSON, limits=limits)
        llm_layout.check(contents.files, contents.texts, allow_pickle=allow_pickle)
        return
    if is_upstream(path):
        return
    if not is_gguf(path):
        raise BadRequest(
            "The file is not a language model: it is neither GGUF nor an archive of a Hugging Face folder. "
            "If you expected a GGUF file, download the file again."
        )
    _check_gguf(path)


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = len(data)
        needed, problem = _needed_bytes(data)
    if problem:
        raise BadRequest(f"The GGUF file cannot be used: {problem}. Download the file again.")
    if size < needed:
        raise BadRequest(
            f"The GGUF file is not complete: it has {size} of {needed} bytes. Download the file again."
        )


def _needed_bytes(data: mmap.mmap) -> tuple[int, str]:
    """Return the size in bytes that the file must have, and its problem ("" if it has none).

    The problem is returned and not raised. The traceback of an exception would keep views of the memory map
    alive, so the map could not be closed.
    """
    with memoryview(data) as view:
        try:
            return gguf.read(view).size, ""
        except gguf.NotGguf as error:
            return 0, str(error)
