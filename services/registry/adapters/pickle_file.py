"""The bytes of a joblib or pickle file, unpacked as joblib packs them, and the packages that models have."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidegate.kernel.errors import BadRequest

STEP = 1024 * 1024
# Enough for any estimator's texts; what lies behind it is not searched.
MOST = 1024**3
# Memory that unpacking LZMA may take; what joblib writes takes 65 MiB at its highest preset.
LARGEST_DICTIONARY = 128 * 1024**2
_ZLIB_OR_GZIP = 47  # zlib's window bits that recognise either head


def pieces(path: Path) -> Iterator[bytes]:
    """Yield the unpacked bytes, at most 1 GiB. Raise BadRequest for a file that is packed and damaged."""
    with path.open("rb") as file:
        head = file.read(6)
        file.seek(0)
        unpacker = _unpacker(head)
        left = MOST
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
                raise BadRequest(f"The joblib file is packed and cannot be unpacked ({error}).") from None


def _unpacked(unpacker: Any, piece: bytes) -> Iterator[bytes]:
    """Unpack in steps: a piece may unpack to a thousand times its size."""
    if hasattr(unpacker, "needs_input"):  # bz2 and lzma keep what is left of their input
        while not unpacker.eof and (piece or not unpacker.needs_input):
            yield unpacker.decompress(piece, STEP)
            piece = b""
        return
    while piece and not unpacker.eof:
        yield unpacker.decompress(piece, STEP)
        piece = unpacker.unconsumed_tail


def _unpacker(head: bytes) -> Any:
    """Return what unpacks a file that begins so; None: it is not packed, or with lz4."""
    if head.startswith((b"\x78", b"\x1f\x8b")):
        return zlib.decompressobj(_ZLIB_OR_GZIP)
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor()
    if head.startswith((b"\xfd7zXZ", b"\x5d\x00")):
        return lzma.LZMADecompressor(memlimit=LARGEST_DICTIONARY)
    return None


def packages(runtime: Path) -> dict[str, str]:
    """Return the packages of the models' environment below ``runtime``, by name; empty: unknown here."""
    found = {}
    for folder in runtime.glob("model-env/lib/python3*/site-packages/*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").partition("-")
        found[name.replace("_", "-").lower()] = version
    return found
