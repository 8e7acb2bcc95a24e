"""Find out from owners, groups and modes which paths another user of this machine can reach."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

OTHERS_PASS, OTHERS_READ, OTHERS_WRITE = stat.S_IXOTH, stat.S_IROTH, stat.S_IWOTH


def first_closed(path: Path, uid: int) -> Path | None:
    """Return the topmost parent folder that the user cannot pass through; None if there is no such folder."""
    for folder in reversed(path.parents):
        if not is_open_to(folder.stat(), uid, OTHERS_PASS):
            return folder
    return None


def is_open_to(found: os.stat_result, uid: int, bits: int) -> bool:
    """Return True if the user ``uid`` has the rights ``bits`` on a file or folder.

    ``found``: the status of the file or folder. ``bits``: the rights as in the last three bits of a file
    mode, for example 4 for reading. The user is assumed to be only in the group with the same number.
    """
    needed = bits << (6 if found.st_uid == uid else 3 if found.st_gid == uid else 0)
    return found.st_mode & needed == needed


def is_usable(folder: Path | str | None, uid: int, bits: int) -> bool:
    """Return True if the user can reach and read a folder, and also has the rights ``bits`` there."""
    with contextlib.suppress(OSError):
        if folder and is_open_to(Path(folder).stat(), uid, bits | OTHERS_READ | OTHERS_PASS):
            return first_closed(Path(folder).resolve(), uid) is None
    return False
