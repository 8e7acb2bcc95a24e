"""What an archive may hold: no way out of its folder, no links, no bomb."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import Member, Paths, Unsafe

# Below this much unpacked, a high ratio harms nobody (a config of blanks compresses 1000 to 1).
RATIO_COUNTS_FROM = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """The most an archive may hold; ``ratio`` is unpacked to packed."""

    members: int = 10_000
    unpacked_bytes: int = 32 * 1024**3
    ratio: int = 100


class ArchiveChecker:
    """Checks members one after the other, as they are read; raises BadRequest at the first bad one."""

    def __init__(self, limits: ArchiveLimits, packed_bytes: int) -> None:
        self._limits = limits
        self._packed = max(1, packed_bytes)
        self._count = self._total = 0
        self._paths = Paths()

    def admit(self, member: Member) -> PurePosixPath | None:
        """The normalised path of a file, None for a folder."""
        if member.size < 0:
            raise BadRequest(
                f"The archive is damaged: the size of {member.name[:80]!r} in it is {member.size} bytes."
            )
        self._count += 1
        self._total += member.size
        if self._count > self._limits.members:
            raise BadRequest(f"The archive has more than {self._limits.members} entries.")
        if self._total > self._limits.unpacked_bytes:
            raise BadRequest(f"The archive unpacks to more than {self._limits.unpacked_bytes} bytes.")
        if self._total > max(RATIO_COUNTS_FROM, self._packed * self._limits.ratio):
            raise BadRequest(
                f"The archive unpacks to more than {self._limits.ratio} times its size (limit: "
                "TIDEGATE_MAX_ARCHIVE_RATIO)."
            )
        try:
            return self._paths.admit(member)
        except Unsafe as error:
            raise BadRequest(str(error)) from None
