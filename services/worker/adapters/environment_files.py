"""Change the owner of an environment's files.

While pip runs, the model's user is the owner. Afterwards, the worker's user is the owner.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tidegate.kernel.errors import ModelFailed


def is_whole(path: Path) -> bool:
    """Return True for a complete environment that a model's user can read."""
    marker = path / "pyvenv.cfg"
    return (
        path.with_suffix(".ok").exists()
        and (path / "bin" / "python3").exists()
        and bool(marker.stat().st_mode & stat.S_IROTH)
    )


def hand_over(path: Path, uid: int | None) -> None:
    """Make the user ``uid`` the owner of a new environment.

    If ``uid`` is None, the worker's user stays the owner.
    """
    if uid is None:
        return
    for each in _tree(path):
        os.chown(each, uid, uid, follow_symlinks=False)


def take_over(path: Path, uid: int | None) -> None:
    """Make the worker's user the owner again, and let every user read the environment.

    ``uid``: the user that owns the files now; None for the worker's user. If it is not None, the files become
    read-only. The calling code must first end all processes of the user ``uid``. Raises ModelFailed if a file
    belongs to an unexpected user. Such a file could be a hard link to a file outside the environment, whose
    owner must not change.
    """
    ours = os.geteuid() if uid is None else uid
    for each in _tree(path):
        _take(each, ours, uid)


def _tree(path: Path) -> Iterator[Path]:
    """Yield a folder and all files and folders below it. Links to folders are not yielded or followed."""
    for folder, _, files in os.walk(path):
        yield Path(folder)
        yield from (Path(folder, name) for name in files)


def _take(path: Path, expected: int, uid: int | None) -> None:
    found = path.lstat()
    if found.st_uid != expected:
        raise ModelFailed(
            f"Installing the requirements left the file {path}, which belongs to another user. Find the "
            "package that creates it, and deploy without that package."
        )
    if uid is not None:
        os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        path.chmod(_readable(found.st_mode, keep_write=uid is None))


def _readable(mode: int, *, keep_write: bool) -> int:
    """Return the new mode of a file or folder with the mode ``mode``.

    Every user may read the file. Every user may execute it if its owner may. The set-user-ID bit is removed.
    ``keep_write``: True if the owner keeps the right to write to the file.
    """
    runs = 0o111 if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else 0
    # A folder always stays writable for its owner. Otherwise its contents could not be removed later.
    writes = stat.S_IWUSR if stat.S_ISDIR(mode) or (keep_write and mode & stat.S_IWUSR) else 0
    return 0o444 | runs | writes
