"""What an archive may hold: no way out of its folder, no links, no bomb."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from tidegate.errors import BadRequest

# Below this much unpacked, a high ratio harms nobody (a config of blanks compresses 1000 to 1).
RATIO_COUNTS_FROM = 256 * 1024 * 1024
MAX_PATH = 1024
MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Limits:
    """The most an archive may hold; ``ratio`` is unpacked to packed."""

    members: int = 10_000
    unpacked_bytes: int = 32 * 1024**3
    ratio: int = 100


@dataclass(frozen=True, slots=True)
class Member:
    """An entry as the archive declares it."""

    name: str
    size: int
    kind: str  # "file", "folder", or in words what else it is


class Tally:
    """Checks members one after the other, as they are read; raises BadRequest at the first bad one."""

    def __init__(self, limits: Limits, packed_bytes: int) -> None:
        self._limits = limits
        self._packed = max(1, packed_bytes)
        self._count = self._total = 0
        self._seen: set[PurePosixPath] = set()

    def admit(self, member: Member) -> PurePosixPath | None:
        """The normalised path of a file, None for a folder."""
        if member.size < 0:
            raise BadRequest(f"The archive says that {member.name[:80]!r} has {member.size} bytes.")
        self._count += 1
        self._total += member.size
        if self._count > self._limits.members:
            raise BadRequest(f"The archive has more than {self._limits.members} entries.")
        if self._total > self._limits.unpacked_bytes:
            raise BadRequest(f"The archive unpacks to more than {self._limits.unpacked_bytes} bytes.")
        if self._total > max(RATIO_COUNTS_FROM, self._packed * self._limits.ratio):
            raise BadRequest(
                f"The archive unpacks to more than {self._limits.ratio} times its size: it looks like a bomb."
            )
        if member.kind not in {"file", "folder"}:
            raise BadRequest(
                f"The archive's {member.name[:80]!r} is a {member.kind}; only plain files and "
                "folders are taken."
            )
        path = safe_path(member.name)
        if member.kind == "folder":
            return None
        if path in self._seen:
            raise BadRequest(f"The archive has {member.name[:80]!r} twice.")
        self._seen.add(path)
        return path


def safe_path(name: str) -> PurePosixPath:
    """``name`` as a relative path that stays below its root; raises BadRequest."""
    path = PurePosixPath(name)
    escapes = path.is_absolute() or ".." in path.parts
    odd = "\\" in name or "\0" in name or (len(name) > 1 and name[1] == ":")
    if escapes or odd or len(name) > MAX_PATH or len(path.parts) > MAX_DEPTH:
        raise BadRequest(
            f"The archive's {name[:80]!r} is not a path below its root: absolute paths, '..', "
            "backslashes and drive letters are refused."
        )
    return path
