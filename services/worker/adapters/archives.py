"""Unpack an archive that somebody uploaded, trusting nothing in it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tidegate.kernel.archives import Broken, members, reading
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.archives import Paths, Unsafe

CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """How much an archive may unpack to. ``ratio``: unpacked to packed, from ``ratio_from_bytes`` on."""

    files: int = 10_000
    total_bytes: int = 64 * 1024**3
    ratio: int = 100
    ratio_from_bytes: int = 256 * 1024**2

    def allowed(self, packed_bytes: int) -> int:
        """The bytes that an archive of this size may unpack to."""
        return min(self.total_bytes, max(self.ratio_from_bytes, self.ratio * packed_bytes))


def unpack(archive: Path, into: Path, limits: Limits | None = None) -> None:
    """Unpack a zip, tar or tar.gz into the new folder ``into``, read exactly as the registry has read it.

    Only plain files and folders below ``into`` are written, never a link or a device, and no file's mode is
    kept. Raises ModelFailed for anything else; then ``into`` is gone again.
    """
    limits = limits or Limits()
    into.mkdir(parents=True)
    try:
        with reading():
            _write_all(archive, into, limits)
    except Broken as problem:
        shutil.rmtree(into, ignore_errors=True)
        raise ModelFailed(f"The archive cannot be unpacked: {problem}") from None
    except ModelFailed:
        shutil.rmtree(into, ignore_errors=True)
        raise


def _write_all(archive: Path, into: Path, limits: Limits) -> None:
    allowed = left = limits.allowed(archive.stat().st_size)
    paths = Paths()
    for number, (member, content) in enumerate(members(archive), start=1):
        if number > limits.files:
            raise ModelFailed(f"The archive holds more than {limits.files} files.")
        try:
            inside = paths.admit(member)
        except Unsafe as error:
            raise ModelFailed(str(error)) from None
        if inside is None:
            continue
        path = into / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        with content() as packed, path.open("xb") as output:
            # Counted as they come: the sizes in an archive's own headers are the sender's word.
            while chunk := packed.read(CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise ModelFailed(
                        f"The archive unpacks to more than the {allowed} bytes allowed for its size."
                    )
                output.write(chunk)
