"""Read a joblib or pickle file's unpacked bytes, and list the packages that models can import.

The packages are those of the Python environment in which models run.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidegate.kernel.errors import BadRequest

STEP = 1024 * 1024
# Reading stops after about this many unpacked bytes of a file. The registry searches the bytes for certain
# texts. In any estimator, these texts come before the limit.
MAX_UNPACKED = 1024**3
# Memory limit for unpacking LZMA. joblib's highest preset needs 65 MiB.
MAX_LZMA_MEMORY = 128 * 1024**2
_ZLIB_OR_GZIP = 47  # the "wbits" value with which zlib accepts the headers of zlib and gzip


def pieces(path: Path) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file, at most about 1 GiB. Raise BadRequest if the file is damaged."""
    with path.open("rb") as file:
        head = file.read(6)
        file.seek(0)
        unpacker = _unpacker(head)
        left = MAX_UNPACKED
        while left > 0 and (piece := file.read(STEP)):
            if unpacker is None:
                left -= len(piece)
                yield piece
                continue
            try:
                for unpacked in _unpacked(unpacker, piece):
                    left -= len(unpacked)
                    yield unpacked
                    if left <= 0:
                        return
            except (zlib.error, OSError, lzma.LZMAError, EOFError) as error:
                raise BadRequest(
                    f"The compressed joblib file is damaged ({error}). Save the estimator again."
                ) from None


def is_plain(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is not compressed.

    Also return True for a file that is compressed with lz4. The calling code must reject lz4 files before
    this call.
    """
    return _unpacker(head) is None


def _unpacked(unpacker: Any, piece: bytes) -> Iterator[bytes]:
    """Yield the unpacked bytes of ``piece`` in steps of 1 MiB.

    The steps limit the needed memory, because a piece may unpack to 1,000 times its size.
    """
    if hasattr(unpacker, "needs_input"):  # bz2 and lzma keep input that is not unpacked yet
        while not unpacker.eof and (piece or not unpacker.needs_input):
            yield unpacker.decompress(piece, STEP)
            piece = b""
        return
    while piece and not unpacker.eof:
        yield unpacker.decompress(piece, STEP)
        piece = unpacker.unconsumed_tail


def _unpacker(head: bytes) -> Any:
    """Return an unpacker for a file that begins with ``head``; None for lz4 and uncompressed files."""
    if head.startswith((b"\x78", b"\x1f\x8b")):
        return zlib.decompressobj(_ZLIB_OR_GZIP)
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor()
    if head.startswith((b"\xfd7zXZ", b"\x5d\x00")):
        return lzma.LZMADecompressor(memlimit=MAX_LZMA_MEMORY)
    return None


def packages(runtime: Path) -> dict[str, str]:
    """Return the version of each package in the Python environment in which models run.

    Return an empty dict if this environment is not installed.
    """
    versions = {}
    for folder in runtime.glob("model-env/lib/python3*/site-packages/*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").partition("-")
        versions[name.replace("_", "-").lower()] = version
    return versions
