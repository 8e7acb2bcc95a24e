"""Limits on the content of an archive: entries, unpacked bytes, compression ratio, and safe paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import Member, Paths, Unsafe

# The ratio is checked only above this size: a small config of blanks may well compress 1000 to 1.
RATIO_COUNTS_FROM = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """Limits of one archive. ``ratio``: unpacked bytes per packed byte."""

    members: int = 10_000
    unpacked_bytes: int = 32 * 1024**3
    ratio: int = 100


class ArchiveChecker:
    """A check of an archive's members, one after the other, as they are read."""

    def __init__(self, limits: ArchiveLimits, packed_bytes: int) -> None:
        self._limits = limits
        self._packed = max(1, packed_bytes)
        self._count = self._total = 0
        self._paths = Paths()

    def admit(self, member: Member) -> PurePosixPath | None:
        """Return the normalised path of a file, None for a folder. Raise BadRequest for a bad member."""
        if member.size < 0:
            raise BadRequest(
                f"The archive is damaged: it says that {member.name[:80]!r} has {member.size} bytes. "
                "Pack it again."
            )
        self._count += 1
        self._total += member.size
        if self._count > self._limits.members:
            raise BadRequest(
                f"The archive has more than {self._limits.members} entries (limit: "
                "TIDEGATE_MAX_ARCHIVE_MEMBERS)."
            )
        if self._total > self._limits.unpacked_bytes:
            raise BadRequest(
                f"The archive unpacks to more than {self._limits.unpacked_bytes} bytes (limit: "
                "TIDEGATE_MAX_UNPACKED_BYTES)."
            )
        if self._total > max(RATIO_COUNTS_FROM, self._packed * self._limits.ratio):
            raise BadRequest(
                f"The archive unpacks to more than {self._limits.ratio} times its size (limit: "
                "TIDEGATE_MAX_ARCHIVE_RATIO)."
            )
        try:
            return self._paths.admit(member)
        except Unsafe as error:
            raise BadRequest(str(error)) from None
