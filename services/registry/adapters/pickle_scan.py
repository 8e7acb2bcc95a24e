"""Find the imports of a pickle or joblib file, in bounded memory. Nothing in the file is executed."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from services.registry.adapters import pickle_file
from services.registry.domain import pickle_machine
from services.registry.domain.pickle_machine import Import, Unscannable
from tidegate.kernel.errors import BadRequest, Unavailable

STEP = 64 * 1024


def imports(path: Path, *, joblib: bool = True) -> set[Import]:
    """Return each (module, name) that loading a file would import. Blocking.

    Raise BadRequest if the imports cannot be read, for example because the file is compressed with lz4.

    ``joblib``: True if joblib loads the file; False if pickle loads it. Only joblib reads compressed files.
    Only joblib reads arrays that lie between the pickle opcodes.
    """
    with path.open("rb") as file:
        head = file.read(6)
        if head.startswith(b"\x04\x22\x4d\x18"):
            raise BadRequest(
                "The joblib file is compressed with lz4, which the registry cannot read, so the file's "
                "imports cannot be checked. Save the estimator with joblib.dump(model, path, compress=3)."
            )
        file.seek(0)
        plain = not joblib or pickle_file.is_plain(head)
        source = _Plain(file) if plain else _Pieces(pickle_file.pieces(path))
        try:
            return pickle_machine.imports(source, arrays=joblib)
        except Unscannable as problem:
            raise BadRequest(
                f"The pickle cannot be checked: {problem}. Save the estimator with joblib.dump(model, path), "
                "or with skops: skops.io.dump(model, 'model.skops')."
            ) from None


def flagged(found: Collection[Import]) -> set[Import]:
    """Return the imports that picklescan calls dangerous. Raise Unavailable if it is not installed."""
    try:
        scanner = importlib.import_module("picklescan.scanner")
    except ModuleNotFoundError:
        raise Unavailable(
            "The registry cannot check pickles, because the package picklescan is not installed. Install it: "
            "make bootstrap."
        ) from None
    # picklescan logs each finding with text from the file. Keep this untrusted text out of our log.
    logging.getLogger("picklescan").setLevel(logging.CRITICAL)
    result = scanner._build_scan_result_from_raw_globals(set(found), "artifact")
    unsafe = scanner.SafetyLevel.Dangerous
    return {(each.module, each.name) for each in result.globals if each.safety == unsafe}


class _Plain:
    """Reader of an uncompressed file. It skips arrays without reading them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = self._left = file.seek(0, 2)
        file.seek(0)

    @property
    def at(self) -> int:
        return self._size - self._left

    def read(self, size: int) -> bytes:
        self._take(size)
        return self._file.read(size)

    def skip(self, size: int) -> None:
        self._take(size)
        self._file.seek(size, 1)

    def line(self, limit: int) -> bytes:
        first = part = self._file.readline(limit)
        self._take(len(part))
        while not part.endswith(b"\n"):
            part = self._file.readline(STEP)
            self._take(len(part))
            if not part:
                raise Unscannable("the pickle has a line without an end")
        return first.removesuffix(b"\n")

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0 or size < 0:
            raise _too_short()


class _Pieces:
    """Reader of the unpacked bytes of a compressed file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece, self._at = b"", 0
        self._before = 0  # the number of bytes in earlier pieces

    @property
    def at(self) -> int:
        return self._before + self._at

    def read(self, size: int) -> bytes:
        if self._at + size <= len(self._piece):
            self._at += size
            return self._piece[self._at - size : self._at]
        parts = []
        while size:
            part = self._some(size)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def skip(self, size: int) -> None:
        if size < 0:
            raise _too_short()
        while size:
            size -= len(self._some(size))

    def line(self, limit: int) -> bytes:
        first = b""
        while True:
            if self._at == len(self._piece):
                self._next()
            end = self._piece.find(b"\n", self._at)
            part = self._piece[self._at : end if end >= 0 else len(self._piece)]
            first += part[: limit - len(first)]
            self._at += len(part)
            if end >= 0:
                self._at += 1
                return first

    def _some(self, size: int) -> bytes:
        if self._at == len(self._piece):
            self._next()
        part = self._piece[self._at : self._at + size]
        self._at += len(part)
        return part

    def _next(self) -> None:
        self._before += len(self._piece)
        self._piece, self._at = b"", 0
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                raise _too_short()
            self._piece = piece


def _too_short() -> Unscannable:
    return Unscannable("the pickle ends too early, or unpacks to more than 1 GiB")
